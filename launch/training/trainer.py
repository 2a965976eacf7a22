"""The loop: steps, and between them what is logged, validated, saved and agreed on by all ranks."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from cluster.checkpoints.attempt import Attempt, is_replaced, is_superseded, read_attempts
from cluster.checkpoints.checkpoint import Checkpoint
from cluster.checkpoints.retention import Retention
from cluster.checkpoints.writer import CheckpointWriter
from cluster.collectives import any_rank, share
from cluster.engine.engine import Engine
from cluster.engine.state import TrainingState
from cluster.records.clock import Clock
from cluster.records.events import Event, EventLog
from cluster.records.ledger import LedgerWriter
from cluster.records.sinks import Board
from cluster.watch.stop import StopRequest
from cluster.watch.stopwatch import stopwatch
from cluster.watch.watchdog import Watchdog
from cluster.world import World
from launch import runfolder
from launch.config import TrainConfig
from launch.training.meter import Meter
from launch.training.nonfinite import advice, is_broken, report, suspects, write_report
from launch.training.pictures import mask_sheet, pictures
from launch.training.prepare import DEEPSPEED_CONFIG, Parts
from launch.training.readings import Readings
from launch.training.resume import Progress, checkpoint_facts, is_better
from launch.training.schedule import Plateau, after_validation, learning_rate
from launch.training.step import StepResult, StepSettings, training_step
from launch.training.validation import validate
from nsi.batch import Batch
from nsi.errors import UserError
from nsi.finetuned import BACKBONE
from nsi.model import undecayed
from nsi.reference_names import SLOT_ENCODER
from shards.loading.feed import on_device
from shards.loading.loader import refuse_faults, training_batches, whole_split
from shards.loading.prefetch import prefetching
from shards.loading.workers import DataWorkers
from shards.order import Order, rows_per_rank


@dataclass(frozen=True)
class Means:
    """All that a rank trains with, made before the first step."""

    world: World
    device: torch.device
    parts: Parts
    micro_rows: int
    attempt: Attempt
    log: EventLog
    board: Board | None  # rank 0's TensorBoard writer, None on the others
    ledger: LedgerWriter | None  # likewise
    workers: DataWorkers
    deadline: float  # when to stop, in seconds since 1970
    clock: Clock
    watchdog: Watchdog


class Trainer:
    """The loop and what changes in it. Every method is called by all ranks together."""

    def __init__(self, config: TrainConfig, means: Means, restored: TrainingState | None) -> None:
        """`restored`: what the engine goes on from, of the checkpoint whose weights the model has; it is not kept."""
        self._config, self._means = config, means
        world, parts, attempt = means.world, means.parts, means.attempt
        self._parts, self._log, self._clock = parts, means.log, means.clock
        self._readings = Readings(
            config.optim.batch_size, world.rank, world.size, config.data.bad_sample_limit, means.device, means.ledger
        )
        self._backbone = parts.backbone.to(means.device)
        self._settings = StepSettings(
            config.loss,
            config.optim.seed,
            world.rank,
            config.optim.batch_size,
            means.micro_rows,
            parts.backbone.feature_dim,
            meets_in_forward=config.engine.zero_stage == 3,
        )
        self._engine = _engine(config, means)
        self._now = replace(parts.restored) if parts.restored else Progress(0, Plateau(), {})
        self._saved_step = parts.restored.step if parts.restored else -1
        self._broken_steps = 0  # in a row, up to now
        self._slow_ranks: set[int] = set()  # told of
        if restored:
            with self._clock.spending("restore"):
                self._engine.restore(restored)
        attempts = config.log_path / runfolder.ATTEMPTS
        self.saver = CheckpointWriter(
            config.log_path / runfolder.CHECKPOINTS,
            Retention(config.watch.keep_last, config.watch.keep_every_hours),
            lambda: is_replaced(attempts, attempt),
            means.ledger.sync if means.ledger else lambda: None,  # so that no checkpoint outruns the ledger
            lambda step, number: is_superseded(step, number, read_attempts(attempts)),
        )

    def run(self, stop: StopRequest) -> bool:
        """Trains to the end, or to the step at which any rank was asked to stop; returns whether it was the end."""
        config, now, order, world = self._config, self._now, self._parts.order, self._means.world
        total = total_steps(config, order)
        validate_every = config.watch.validate_every or max(1, round(order.samples / config.optim.batch_size))
        read = training_batches(
            self._parts.train_rows, order, self._parts.shape, world.rank, world.size, now.step, self._means.workers
        )
        clock = self._clock
        meter = Meter(clock)
        own = stopwatch(self._means.device)
        stopped = False
        # A checkpoint that is on its way to the disk must get there, whatever ends the loop.
        with (
            contextlib.closing(self.saver),
            contextlib.closing(read),
            prefetching(self._parts.train_rows, order, now.step, world.rank, world.size) as prefetch,
        ):
            checked = read if config.data.on_bad_sample == "skip" else map(refuse_faults, read)
            batches = on_device(checked, self._means.device)
            while now.step < total and not stopped:
                clock.enter("step", now.step)
                prefetch(now.step)
                own.start()
                with clock.spending("data_wait"):
                    batch = next(batches)
                self._readings.add(now.step, batch)
                lr = learning_rate(config.optim, now.step, total, now.plateau)
                result = training_step(self._engine, self._backbone, batch, now.step, lr, self._settings, own.lap)
                now.step += 1
                clock.enter("step", now.step)
                self._broken_steps = self._broken_steps + 1 if is_broken(result, config.engine.precision) else 0
                self._means.watchdog.note(own.seconds())  # by now the device has been waited for
                too_many = self._broken_steps > config.watch.nonfinite_limit
                meter.count(result, broken=self._broken_steps > 0)
                if now.step % config.watch.log_every == 0 or now.step == total or too_many:
                    self._flush_readings()
                    scale = self._engine.loss_scale
                    slowness = self._means.watchdog.slowness()
                    slow = slowness.get(world.rank, 1.0)
                    self._log.emit(meter.event(now.step, lr, result, config, order, world.size, scale, slow))
                    self._tell_of_writing()
                    self._tell_of_stragglers(slowness)
                if too_many:
                    self._stop_broken(batch, result)
                if (now.step % validate_every == 0 or now.step == total) and not self._broken_steps:
                    self._validate()
                if now.step % config.watch.checkpoint_every == 0:
                    self._save()
                stopped = any_rank(stop.look(self._means.deadline))
            self._save(at_the_end=True)
            with clock.spending("checkpoint"):
                self.saver.finish()
            self._tell_of_writing()
        finished = now.step >= total
        stop_file = config.log_path / runfolder.STOP
        if stop.reason == str(stop_file):
            with contextlib.suppress(OSError):
                stop_file.unlink()  # done as told; left there it would stop what is started later
        self._log.emit(self._log.instant("stop", {"finished": finished}))
        if not finished and self._means.world.rank == 0 and not stop.is_for_good:
            # A batch script reads this mark: the job was cut, not done, and wants to be queued again.
            (config.log_path / runfolder.STOPPED).write_text(f"{now.step}\n")
        return finished

    def _validate(self) -> None:
        """Figures over the validation split; the weights are kept where they are the best so far."""
        with self._clock.spending("eval"):
            figures = self._measure()
        if is_better(figures, self._now.best, self._config.watch.select_by):
            self._now.best = {"step": self._now.step, "R@5": figures["R@5"], "loss": figures["loss"]}
            self._save()

    def _measure(self) -> dict[str, float]:
        """The figures of a validation, told to all who watch."""
        config, now, world = self._config, self._now, self._means.world
        t0 = self._clock.now()
        rows, shape, workers = self._parts.val_rows, self._parts.shape, self._means.workers
        batches = whole_split(rows, shape, config.optim.batch_size, world.rank, world.size, workers)
        faults: list[str] = []

        def tolerant(batch: Batch) -> Batch:
            self._clock.touch()  # a long validation is no hang
            faults.extend(fault.text for fault in batch.faults)
            return batch

        checked = map(tolerant, batches if config.data.on_bad_sample == "skip" else map(refuse_faults, batches))
        found = validate(self._engine, self._backbone, checked, self._settings, config.model.position_dims)
        if faults:
            self._tell_of_bad_samples(faults)
        figures = share(found.figures)
        now.plateau = after_validation(now.plateau, config.optim, now.step, figures["loss"])
        if self._means.board is not None and len(found.sample_ids_B):
            images_BCHW = pictures(self._parts.val, found.sample_ids_B.tolist(), config.data.image_size)
            sheet_3HW = mask_sheet(images_BCHW, found.alphas_BNP, self._backbone.grid)
            self._means.board.picture("validation/slots", sheet_3HW, now.step)
        self._log.emit(Event("validation", now.step, t0, self._clock.now(), figures))
        return figures

    def _tell_of_writing(self) -> None:
        """What was written, and what could not be, to all who watch."""
        for step in self.saver.saved():
            self._log.emit(self._log.instant("saved", {"checkpoint": step}))
        board = self._means.board
        for text in (*self.saver.troubles(), *self._log.troubles(), *(board.troubles() if board else ())):
            self._log.emit(self._log.instant("storage", {"text": text}))

    def _tell_of_stragglers(self, slowness: dict[int, float]) -> None:
        """Who has become slow; once, as long as it lasts."""
        slow = {rank: times for rank, times in slowness.items() if times >= self._config.watch.straggler_factor}
        if self._means.world.rank == 0:
            for rank in slow.keys() - self._slow_ranks:
                self._log.emit(self._log.instant("straggler", {"rank": rank, "times": slow[rank]}))
        self._slow_ranks = set(slow)

    def _stop_broken(self, batch: Batch, result: StepResult) -> NoReturn:
        """Ends a run whose numbers are none any more, with a report. The watchers have been told."""
        step = self._now.step
        found = report(self._engine, self._backbone, batch, step - 1, self._settings, result)
        path = self._config.log_path / f"{runfolder.NONFINITE}-{step:08d}.json"
        if self._means.world.rank == 0:
            write_report(path, found)
        raise UserError(
            f"step {step}: the loss or its gradient is not a finite number, {self._broken_steps} steps in a row; "
            f"{suspects(found)}; {path} has the largest values; {advice(found)}"
        )

    def _flush_readings(self) -> None:
        """Brings the ledger up to date, and tells of damaged scenes."""
        if skipped := self._readings.flush(self._now.step):
            self._tell_of_bad_samples([each.fault for each in skipped])

    def _tell_of_bad_samples(self, faults: list[str]) -> None:
        self._log.emit(self._log.instant("bad_samples", {"count": len(faults), "faults": faults}))

    def _save(self, at_the_end: bool = False) -> None:
        """Hands the whole state to the writer, unless this step has been saved.

        Where steps are left out the weights may be at fault, and must not take the place of older ones; at the end
        they are the last good step's, and all that is left.
        """
        now = self._now
        if now.step == self._saved_step or (self._broken_steps and not at_the_end):
            return
        with self._clock.spending("checkpoint"):
            self._hand_over()
        self._tell_of_writing()

    def _hand_over(self) -> None:
        """Copies the state and gives it to the writer."""
        now, t0 = self._now, self._clock.now()
        self._flush_readings()
        state = self._engine.state()
        if state is not None:
            manifest, backbone_hash = self._parts.train.manifest, self._parts.backbone_hash
            facts = checkpoint_facts(self._config, manifest.fingerprint, manifest.vocabulary, backbone_hash, now)
            keep = frozenset({int(now.best["step"])} if now.best else ())
            self.saver.submit(Checkpoint(now.step, self._means.attempt.number, state, facts), keep)
        self._saved_step = now.step
        self._log.emit(Event("checkpoint", now.step, t0, self._clock.now()))


def total_steps(config: TrainConfig, order: Order) -> int:
    """Where training ends: --max_steps, or so many steps as --epochs take."""
    return config.optim.max_steps or math.ceil(config.optim.epochs * order.samples / config.optim.batch_size)


def _engine(config: TrainConfig, means: Means) -> Engine:
    """DeepSpeed around the model."""
    model, rows = means.parts.model, rows_per_rank(config.optim.batch_size, means.world.size)
    return Engine(
        model,
        config.engine,
        means.world.size,
        means.micro_rows,
        math.ceil(rows / means.micro_rows),
        config.optim.grad_clip,
        config.optim.weight_decay,
        DEEPSPEED_CONFIG,
        (*SLOT_ENCODER, BACKBONE) if config.optim.clip_scope == "slot_encoder" else (),
        undecayed(model),
        {BACKBONE: config.backbone.backbone_lr / config.optim.lr},
    )
