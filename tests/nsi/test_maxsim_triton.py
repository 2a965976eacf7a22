"""The Triton kernels against the dense form: on a GPU where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsi.loss import Rows, contrastive_sum
from nsi.maxsim import maxsim
from tests.nsi.dense import dense_contrastive_sum, dense_scores

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton looks once, when it is imported
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
kernels = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="no GPU; the interpreter runs it")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """Runs the others, on the CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "kernels", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    assert "skipped" not in found.stdout


def draw(A: int, N: int, C: int, T: int, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    slots_ANE, primitives_CTE = torch.randn(A, N, E, generator=g), torch.randn(C, T, E, generator=g)
    objects_CT = torch.rand(C, T, generator=g) < 0.6
    return slots_ANE.to(DEVICE).requires_grad_(), primitives_CTE.to(DEVICE).requires_grad_(), objects_CT.to(DEVICE)


# Blocks are of 64 rows of at least 16 slots, 64 schemas and 32 of the embedding: sizes on either side of each.
@kernels
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("max_elements", [None, 40])
@pytest.mark.parametrize(
    "shape", [(5, 3, 66, 2, 40), (9, 15, 3, 3, 64), (2, 70, 3, 2, 16), (1, 300, 2, 1, 5), (1,) * 5]
)
def test_kernels_equal_the_dense_form(shape: tuple[int, int, int, int, int], max_elements: int | None, reduce) -> None:
    slots_ANE, primitives_CTE, objects_CT = draw(*shape)
    weights_AC = torch.arange(1.0, shape[0] * shape[2] + 1, device=DEVICE).view(shape[0], shape[2]).sin()
    exact = [each.detach().double().requires_grad_() for each in (slots_ANE, primitives_CTE)]
    scores_AC = maxsim(slots_ANE, primitives_CTE, objects_CT, reduce, max_elements)
    found = torch.autograd.grad((scores_AC * weights_AC).sum(), [slots_ANE, primitives_CTE])
    wanted_AC = dense_scores(*exact, objects_CT, reduce)
    wanted = torch.autograd.grad((wanted_AC * weights_AC).sum(), exact)
    for ours, theirs in zip([scores_AC, *found], [wanted_AC, *wanted], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, **CLOSE)


@kernels
@pytest.mark.parametrize("max_elements", [None, 12])
def test_kernels_give_the_dense_loss(max_elements: int | None) -> None:
    slots_RNE, primitives_RTE, objects_RT = draw(7, 5, 7, 3, 20)
    ids_R = torch.tensor([1, 2, 3, 4, 2, 6, 7], device=DEVICE)
    rows_R = torch.tensor([True, True, True, True, True, False, True], device=DEVICE)
    exact = [each.detach().double().requires_grad_() for each in (slots_RNE, primitives_RTE)]
    loss = contrastive_sum(
        Rows(slots_RNE, primitives_RTE, objects_RT, ids_R, rows_R), lambda x: x, 0, 0.5, "sum", max_elements
    )
    found = torch.autograd.grad(loss, [slots_RNE, primitives_RTE])
    wanted_loss = dense_contrastive_sum(Rows(*exact, objects_RT, ids_R, rows_R), 0.5)
    wanted = torch.autograd.grad(wanted_loss, exact)
    for ours, theirs in zip([loss, *found], [wanted_loss, *wanted], strict=True):
        torch.testing.assert_close(ours.double(), theirs, **CLOSE)


@kernels
@pytest.mark.parametrize("slots", [3, 70])
def test_kernels_give_ties_to_the_lowest_slot(slots: int) -> None:
    slots_ANE, primitives_CTE, objects_CT = draw(5, slots, 3, 2, 20)
    twice = torch.cat([slots_ANE, slots_ANE], dim=1).detach().requires_grad_()
    (found,) = torch.autograd.grad(maxsim(twice, primitives_CTE, objects_CT).sum(), [twice])
    assert not found[:, slots:].any()
    (wanted,) = torch.autograd.grad(dense_scores(slots_ANE, primitives_CTE, objects_CT).sum(), [slots_ANE])
    torch.testing.assert_close(found[:, :slots], wanted, **CLOSE)


@kernels
def test_kernels_read_inputs_of_any_strides() -> None:
    slots_ANE, primitives_CTE, objects_CT = draw(5, 3, 4, 2, 20)
    turned = [each.detach().mT.contiguous().mT.requires_grad_() for each in (slots_ANE, primitives_CTE)]
    assert not turned[0].is_contiguous()
    found = torch.autograd.grad(maxsim(*turned, objects_CT).sum(), turned)
    wanted = torch.autograd.grad(maxsim(slots_ANE, primitives_CTE, objects_CT).sum(), [slots_ANE, primitives_CTE])
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@kernels
def test_kernels_are_what_runs() -> None:
    slots_ANE, primitives_CTE, objects_CT = draw(2, 3, 2, 2, 4)
    maxsim(slots_ANE, primitives_CTE, objects_CT)
    assert "nsi.maxsim_triton" in sys.modules


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton has its compiler on Linux")
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_without_a_gpu(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code for an A100 and an H100. The interpreter takes much that the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nsi import maxsim_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    blocks = maxsim_triton.block_sizes(15, 64)
    warps = blocks.pop("num_warps")
    types = {"I": "i32", "J": "i32", "best_TIJ": "*i16"}
    for kernel in ("scores_kernel", "grad_slots_kernel", "grad_primitives_kernel"):
        function = getattr(maxsim_triton, kernel)
        constants = {"N": 15, "T": 10, "E": 64, **blocks}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*fp32") for name in function.arg_names
        }
        source = ASTSource(function, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 96 * 1024  # what a block of threads may have from sm_86 on
