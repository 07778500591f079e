"""The loop of pre-training on Fabric: steps, checkpoints, health, and what ends it early.

    views of train.batch_size images -> loss, mean over parts and processes -> gradients, clipped -> optimizer
    every train.health_every steps: health and verdict;  every end of an epoch: online judgement, checkpoint

A checkpoint is taken between two steps and holds what decides the next one: weights and buffers of the method (momentum
copies, queues, centres), the optimizer's state, the number of steps. Order, views and random numbers follow from the
seed and that number, so a continuation is the same training, bit for bit on the same machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader

from otcxr.console import Bar, Progress
from otcxr.data.dataset import (
    EpochBatches,
    LoadedViews,
    PixelCache,
    ViewDataset,
    join_views,
    refuse_too_many,
    write_skipped,
)
from otcxr.data.geometry import ViewBatch
from otcxr.data.records import Collection, Record, Skipped
from otcxr.data.views_device import ViewRequest, device_views
from otcxr.distributed import agree, alone, everyone, mean_over_processes, process, processes, together
from otcxr.errors import OtcxrError, StorageError
from otcxr.faults import Collapsed, Interrupted, begin_worker, explain_fault, stop_request
from otcxr.health import Watch, observe, verdict
from otcxr.launch import full_state, restore_optimizer, set_up
from otcxr.loggers import Loggers
from otcxr.methods import SSLMethod, StepOutput, find_method
from otcxr.nn.encoder import build_encoder, load_state
from otcxr.online import OnlineProbe
from otcxr.optim import cosine_schedule, make_optimizer, set_learning_rate
from otcxr.probes import write_pairs
from otcxr.runs import Run
from otcxr.settings import PretrainConfig, TrainConfig, config_to_plain

__all__ = ["FORMAT", "Data", "Training", "build_method", "optimizer_of"]

FORMAT = 3  # of a checkpoint; also raised when the views of a seed change: a run cannot go on with other ones


def build_method(config: PretrainConfig, images: int | None = None) -> SSLMethod:
    """Build method and encoder with initial weights that depend on the seed only, not on the global random state.

    All methods of one seed start from the same encoder.

    Args:
        config: The settings.
        images: Training images, to which a method may fit its settings (``Method.settings``); None takes them as given.
    """
    encoder = build_encoder(
        config.encoder.name,
        width=config.encoder.width,
        stride=config.encoder.stride or 32,
        padding=config.encoder.padding,
        seed=config.seed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed + 1)  # not torch.manual_seed: it reseeds the GPU too
        settings = config.settings
        if images is not None and hasattr(settings, "for_images"):
            settings = settings.for_images(images)
        return find_method(config.method).build(encoder, settings)


def optimizer_of(method: SSLMethod, train: TrainConfig) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
    """How the optimizer of a method is made, once its parameters are where they belong."""
    return lambda module: make_optimizer(
        module, train.optimizer, learning_rate=train.learning_rate, weight_decay=train.weight_decay,
        momentum=train.momentum, trust=train.trust, constant_rate=method.constant_rate(),
    )  # fmt: skip


class Data(NamedTuple):
    """The images of a training: the split, indices of the usable ones, the skipped ones, pixels in memory."""

    collection: Collection
    usable: list[int]
    skipped: list[Skipped]
    cache: PixelCache


class Training:
    """The loop: from the checkpoint, or from the start, to the last epoch."""

    def __init__(
        self,
        config: PretrainConfig,
        fabric: Fabric,
        run: Run,
        method: SSLMethod,
        data: Data,
        facts: Mapping[str, Any],
        probes: Collection,
        online: OnlineProbe | None,
        checkpoint: Mapping[str, Any] | None,
        progress: Progress,
    ) -> None:
        train = config.train
        self.config, self.fabric, self.run, self.method, self.data = config, fabric, run, method, data
        self.facts, self.probes, self.online, self.progress = facts, probes, online, progress
        self.sampler = EpochBatches(
            data.usable, train.batch_size, config.seed,
            process=process(), processes=processes(), accumulate=train.accumulate,
        )  # fmt: skip
        records: Sequence[Record] = data.collection.records
        self.loader = DataLoader(
            ViewDataset(records, data.usable, config.views, config.seed, data.cache),
            batch_sampler=self.sampler, collate_fn=join_views, num_workers=config.data.workers,
            pin_memory=fabric.device.type == "cuda", worker_init_fn=begin_worker,
            generator=torch.Generator(),  # else every epoch would take a number from the global stream
        )  # fmt: skip
        self.steps = len(self.sampler)  # an epoch
        self.total = self.steps * train.epochs
        self.warmup = round(train.warmup * self.total)
        self.step, self.elapsed, self.epoch_loss = 0, 0.0, 0.0
        self.lost: list[Skipped] = []
        self.trouble: OtcxrError | None = None
        self.batches: Iterator[LoadedViews] | None = None
        self.left_out = sorted(set(range(len(records))) - set(data.usable))
        self.best: dict[str, Any] | None = None  # by which measure, and its value
        self.watch = Watch(train.collapse_patience, self.warmup)
        self.collapsed, self.marked, self.verdict = False, False, ""
        self.mark = ""  # what the progress line says of the health
        self.loggers: Loggers | None = None
        self.module, self.optimizer = set_up(fabric, method, train, optimizer_of(method, train))
        self.saved_step: int | None = None
        if checkpoint is not None:
            self._restore(checkpoint)

    # --- what decides the next step ---
    def _state(self, weights: Mapping[str, Any], optimizer: Mapping[str, Any], *, new_epoch: bool) -> dict[str, Any]:
        return {
            "format": FORMAT, "method": dict(weights), "optimizer": dict(optimizer), "step": self.step,
            "epoch_loss": 0.0 if new_epoch else self.epoch_loss, "elapsed_s": self.elapsed, "best": self.best,
            "watch": self.watch.state(), "data_digest": self.facts["data_digest"], "left_out": self.left_out,
        }  # fmt: skip

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint; the weights were loaded before the processes shared them."""
        restore_optimizer(self.method, self.optimizer, state["optimizer"], self.config.train)
        self.step = self.saved_step = int(state["step"])
        self.epoch_loss, self.elapsed = float(state["epoch_loss"]), float(state["elapsed_s"])
        self.best = state["best"]
        self.watch.load(state["watch"])

    def _save(self, *, end_of_epoch: bool = False) -> None:
        """Write everything a continuation needs, and what others read: the encoder, the method, the pairs."""
        weights, optimizer = full_state(self.method, self.optimizer, self.config.train)
        with together():  # nobody leaves before it is written, or waits for one that could not write
            if process() == 0:
                with self._in_words(), alone():
                    self._write(weights, optimizer, end_of_epoch)
        if end_of_epoch:
            self.epoch_loss = 0.0
        self.saved_step = self.step

    def _write(self, weights: Mapping[str, Any], optimizer: Mapping[str, Any], end_of_epoch: bool) -> None:
        method = self._whole(weights)
        best = self._judge(method) if end_of_epoch else None
        where = {**self.facts, "step": self.step, "epochs": self.step / self.steps}
        if self.step:
            self.run.write_weights(method, method.kept(), where)
            write_pairs(self.run, method, self.probes, self.config.views, self.config.seed, self.fabric.device)
        if best is not None:
            self.run.write_best(method.kept(), {**where, "best": best})
        state = self._state(weights, optimizer, new_epoch=end_of_epoch)
        self.run.write_checkpoint(state, self.config.train.keep, best=best is not None)

    def _judge(self, method: SSLMethod) -> dict[str, Any] | None:
        """Judge the encoder at the end of an epoch; by which measure it is the best so far, None if it is not."""
        name, value, sign = "mean loss of the epoch", self.epoch_loss / self.steps, -1
        if self.online is not None:
            result = self.online.judge(method.kept())
            self.run.append_metrics({"step": self.step, "epoch": round(self.step / self.steps, 4), "online": result})
            name, value, sign = f"online kNN, macro AUROC, {result['judged_on']}", self.online.score(result), 1
        if math.isnan(value):
            return None
        # another measure than before (train.online_images was changed) begins anew
        if self.best is not None and self.best["measure"] == name and sign * value <= sign * self.best["value"]:
            return None
        self.best = {"measure": name, "value": value}
        return self.best

    def _whole(self, weights: Mapping[str, Any]) -> SSLMethod:
        """The method with all of its weights in this process."""
        if self.config.train.strategy == "ddp":
            return self.method
        method = build_method(self.config, len(self.data.usable))
        load_state(method, weights, "the sharded weights")
        return method.to(self.fabric.device)

    # --- the loop ---
    def run_to_end(self, stop_after: int | None = None) -> None:
        """Train to the last epoch, or to step ``stop_after``."""
        with together():
            if process() == 0:
                self.run.cut_metrics(self.step)
        if self.step >= self.total:
            self.progress.say(f"{self.run.path} has finished all {self.config.train.epochs} epochs already")
            return
        with together():  # one that cannot be made stops all processes, not only this one
            if process() == 0 and self.config.train.loggers:
                settings = config_to_plain(self.config)
                self.loggers = Loggers(self.config.train.loggers, self.run.path, settings, self.progress)
        self.method.train()
        images = self.total * self.config.train.batch_size
        try:
            with self._in_words(), stop_request() as stop, self.progress.bar("pre-training", images, "images") as bar:
                if self.saved_step is None:
                    self._save()  # a folder that cannot be written to is found now, not after the first epoch
                self._loop(stop_after, stop.is_set, bar)
        except StorageError as error:
            told = StorageError(f"{error}. {self._kept()}")
            told.told_elsewhere = error.told_elsewhere
            raise told from error
        finally:
            self._end_loaders()
            if self.loggers is not None:
                self.loggers.close()
        if process() == 0:
            seen = [line["verdict"]["text"] for line in self.run.read_metrics() if "verdict" in line]
            self.progress.say(seen[-1] if seen else f"{self.run.path} is at step {self.step} of {self.total}")

    def _end_loaders(self) -> None:
        """End the loader processes now: a traceback keeps them alive, with all signals ignored, past the end."""
        end = getattr(self.batches, "_shutdown_workers", None)  # torch has no public name for it
        if end is not None:
            end()

    def _loop(self, stop_after: int | None, asked: Any, bar: Bar) -> None:
        train = self.config.train
        self.tick = saved_at = time.monotonic()
        while self.step < self.total:
            self.sampler.epoch, self.sampler.first = divmod(self.step, self.steps)
            batches = self.batches = iter(self.loader)
            for _ in range(self.sampler.first, self.steps):
                loss = self._one_step(batches)
                bar(self.step * train.batch_size, f"loss {loss:.3f}{self.mark}")
                ends = self.step % self.steps == 0
                late = time.monotonic() - saved_at > 60 * train.checkpoint_minutes
                stop, late, collapsed, trouble = self._any(
                    asked() or self.step == stop_after, late, self.collapsed, self.trouble is not None
                )
                if trouble:
                    agree(self.trouble)
                if ends or stop or late or collapsed:
                    self._save(end_of_epoch=ends)
                    self._report_lost()
                    saved_at = time.monotonic()
                if collapsed:
                    raise self._told(Collapsed(
                        f"stopped after step {self.step} of {self.total}: {self.verdict}. The state is saved; change "
                        f"the settings, or go on nevertheless with: otcxr pretrain --resume true "
                        f"--train.on_collapse warn --out {self.run.path}"
                    ))  # fmt: skip
                if self.step == stop_after:
                    return
                if stop and self.step < self.total:
                    raise self._told(Interrupted(
                        f"stopped after step {self.step} of {self.total}; "
                        f"go on with: otcxr pretrain --resume true --out {self.run.path}"
                    ))  # fmt: skip

    def _one_step(self, batches: Iterator[LoadedViews]) -> float:
        """One step of the optimizer; the loss, mean over parts and processes."""
        train, number = self.config.train, self.step
        factor = cosine_schedule(number, self.warmup, self.total)
        set_learning_rate(self.optimizer, train.learning_rate, factor)
        look = number % train.health_every == 0 or number + 1 == self.total
        self.optimizer.zero_grad()
        loss = 0.0
        for part in range(train.accumulate):
            batch = self._fetch(batches)
            self._seed(part)
            last = part + 1 == train.accumulate
            with self.fabric.no_backward_sync(self.module, enabled=not last):
                output = self._forward(batch, observe=look and last)
                self.fabric.backward(output.loss / train.accumulate)
            loss += float(output.loss.detach()) / train.accumulate
        (loss,) = mean_over_processes([loss], self.fabric.device)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        norm = self._clip()
        if not math.isfinite(norm):  # before the step: no weight may take it in
            raise self._diverged(f"the gradient's norm is {norm}")
        self.optimizer.step()
        self.step += 1
        self.epoch_loss += loss
        self.method.after_step(self.step / self.total)
        # wall time since the last step ended, so views, health and checkpoints are in it
        now = time.monotonic()
        spent, self.tick = now - self.tick, now
        self.elapsed += spent
        if look or self.step % train.log_every == 0:
            self._log(output, batch, loss, norm, train.learning_rate * factor, spent)
        return loss

    def _fetch(self, batches: Iterator[LoadedViews]) -> ViewBatch:
        """The next part of the batch on this device; a source that is gone ends all processes."""
        problem: OtcxrError | None = None
        batch: ViewBatch | None = None
        try:
            with self._in_words():
                loaded = next(batches)
                self.lost += loaded.lost
                if isinstance(loaded.batch, ViewRequest):
                    batch = device_views(loaded.batch, self.fabric.device)
                else:
                    batch = self.fabric.to_device(loaded.batch)
        except OtcxrError as error:
            problem = error
        if self._any(problem is not None)[0]:
            agree(problem)
        assert batch is not None
        return batch

    def _seed(self, part: int) -> None:
        """Set torch's random state (of this loop: see ``pretrain``) for one part of one step of one process."""
        entropy = np.random.SeedSequence((self.config.seed, self.step, part, process()))
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    def _forward(self, batch: ViewBatch, *, observe: bool) -> StepOutput:
        try:
            output: StepOutput = self.module(batch, observe=observe)
        except ValueError as error:  # the transport refuses costs and masses that are not finite
            if "nan" not in str(error).lower() and "finite" not in str(error):
                raise
            raise self._diverged("features are not finite") from error
        return output

    def _clip(self) -> float:
        """Clip the gradients; their norm before."""
        limit = math.inf if self.config.train.clip is None else self.config.train.clip
        norm: Any = self.fabric.clip_gradients(self.module, self.optimizer, max_norm=limit, error_if_nonfinite=False)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _log(self, output: StepOutput, batch: ViewBatch, loss: float, norm: float, rate: float, spent: float) -> None:
        """One line of metrics; on a look also the health of what this process has seen, and the verdict."""
        values = [float(term) for term in output.terms.values()]
        terms = dict(zip(output.terms, mean_over_processes(values, self.fabric.device), strict=True))
        if process() != 0:
            return
        line: dict[str, Any] = {
            "step": self.step, "epoch": round(self.step / self.steps, 4), "loss": loss, **terms,
            "gradient_norm": norm, "learning_rate": rate,
            "images_per_s": round(self.config.train.batch_size / spent, 1), "elapsed_s": round(self.elapsed, 2),
        }  # fmt: skip
        if output.observed is not None:
            line["health"] = observe(output.observed, batch, self.method.encoder.first_centre)
            judged = verdict(line["health"], terms)
            line["verdict"] = judged._asdict()
            self.mark = ", healthy" if judged.healthy else ", unhealthy"
            self._heed(self.watch.see(self.step, judged), judged.text)
        try:
            self.run.append_metrics(line)
            if self.loggers is not None:
                self.loggers.log(line, self.step)
        except StorageError as error:  # raised by all processes together, where they next meet
            self.trouble = error

    def _heed(self, action: str, text: str) -> None:
        """Do what ``train.on_collapse`` asks for."""
        how = self.config.train.on_collapse
        self.verdict = text
        if how == "ignore":
            return
        marked = self.marked
        if action in ("warn", "stop"):
            self.marked = True
        if action == "warn" or (action == "stop" and how == "warn" and not marked):
            self.progress.say(f"warning, step {self.step}: {text}")
        if action == "recovered":
            self.marked = False
            self.progress.say(f"step {self.step}: healthy again: {text}")
        self.collapsed = action == "stop" and how == "stop"

    def _report_lost(self) -> None:
        """List the images that could not be read any more; too many end the run, of which everything is saved."""
        every = [item for part in everyone(tuple(self.lost)) for item in part]
        self.lost.clear()
        known = {item.image for item in self.data.skipped}
        fresh = list({item.image: item for item in every if item.image not in known}.values())
        if not fresh:
            return
        self.data.skipped.extend(fresh)
        if process() == 0:
            self.progress.say(
                f"warning: {len(fresh)} images can no longer be read, others stand in for them (first: "
                f"{fresh[0].image}: {fresh[0].reason}); listed in {self.run.path / 'skipped.csv'}"
            )
        with together():
            if process() == 0:
                write_skipped(self.run.path / "skipped.csv", self.data.skipped)
        named = len(self.data.collection.records) + len(self.data.collection.skipped)
        try:
            refuse_too_many(self.data.skipped, named, self.config.data.max_skipped, self.data.collection.name)
        except OtcxrError as error:
            raise self._told(error) from None

    def _any(self, *flags: bool) -> list[bool]:
        """Whether any process says so, for each flag."""
        return [share > 0 for share in mean_over_processes([float(flag) for flag in flags], self.fabric.device)]

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """Turn a failure of the machine within it into an error that names the fix; others pass as they are."""
        try:
            yield
        except (RuntimeError, MemoryError, OSError) as error:
            fault = explain_fault(
                error, batch_size=self.config.train.batch_size, accumulate=self.config.train.accumulate,
                size=self.config.views.size, workers=self.config.data.workers, kept=self._kept(),
            )  # fmt: skip
            if fault is None:
                raise
            raise fault from error

    def _kept(self) -> str:
        """What can be gone on from, as a sentence."""
        if self.saved_step is None:
            return "Nothing has been trained yet."
        return (f"{self.run.path / 'last.ckpt'} holds step {self.saved_step} of {self.total}; go on with: "
                f"otcxr pretrain --resume true --out {self.run.path}")  # fmt: skip

    def _diverged(self, what: str) -> OtcxrError:
        last = f"{self.run.path / 'last.ckpt'} holds the last good state, step {self.saved_step}."
        return self._told(OtcxrError(
            f"the training diverged at step {self.step + 1}: {what}. {last} "
            "Start anew (another --out): lower train.learning_rate, raise train.warmup, or use train.precision 32-true"
        ))  # fmt: skip

    def _told(self, error: OtcxrError) -> OtcxrError:
        """An error that all processes raise together: process 0 shows it."""
        error.told_elsewhere = process() != 0
        return error
