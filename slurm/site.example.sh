# What is true of one cluster alone. Copy this file to slurm/site.sh and edit; every line is optional, and without the
# file all works on a cluster that has a default partition and this project's environment on a shared disk.
#
# Bash reads it: in the batch scripts, on the first node of a job, and for `nsi submit`. The environment wins, as in
# `NSI_PARTITION=debug nsi submit ...`.
# shellcheck shell=bash disable=SC2034

# Options of sbatch that `nsi submit` fills in. Plain sbatch knows nothing of them: give --account and so on there.
NSI_ACCOUNT="${NSI_ACCOUNT:-}"
NSI_PARTITION="${NSI_PARTITION:-}"
NSI_QOS="${NSI_QOS:-}"
NSI_CONSTRAINT="${NSI_CONSTRAINT:-}"

# The environment's python, where it is not PROJECT/.venv/bin/python nor the python3 of nsi_site below.
NSI_PYTHON="${NSI_PYTHON:-}"

# Words before python; the container must have the project's packages and see the folders that are named to it.
NSI_CONTAINER="${NSI_CONTAINER:-}" # apptainer exec --nv nsi.sif

# The network interface between the nodes (`ip -brief address` lists them), where NCCL and gloo do not find it.
NSI_INTERFACE="${NSI_INTERFACE:-}" # ib0

# A folder on each node's own disk, for NSI_STAGE=1: shards in use are copied there, and removed when the job ends.
NSI_SCRATCH="${NSI_SCRATCH:-}" # /local/scratch/$USER

# Run at the start of each job.
nsi_site() {
    : # module load python/3.11 cuda/12.4
}
