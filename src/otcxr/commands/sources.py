"""Verbs for a source: pack, data inspect, data estimate, data preview."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from otcxr.commands.terminal import add_training, parsed, to_log, whole_method
from otcxr.config import add_settings, make_parser, parse, peek, read_settings
from otcxr.console import RichProgress
from otcxr.errors import ConfigError, DataError

__all__ = ["data_estimate", "data_inspect", "data_preview", "pack"]


def data_inspect(words: Sequence[str]) -> int:
    """otcxr data inspect SOURCE."""
    from otcxr.data.dataset import PixelCache, check_records, write_skipped
    from otcxr.data.sources import open_collection

    parser = make_parser("data inspect", "Count what a source holds, read every image once, list what cannot be used.")
    parser.add_argument("source", type=str, help="READER:ARGUMENT, such as nih:PATH")
    parser.add_argument("--skipped", type=str, default="", help="write the list of skipped images to this CSV file")
    plain = parsed(parser, words)
    to_log()
    progress = RichProgress()
    collection = open_collection(plain["source"])
    with progress.bar("reading images", len(collection.records), "images") as bar:
        usable, skipped, _ = check_records(collection, PixelCache(0.0), 1.0, bar)
    records = [collection.records[index] for index in usable]

    def count(title: str, values: list[Any]) -> None:
        counted = collections.Counter("unknown" if v is None or v == "" else str(v) for v in values)
        progress.say(f"{title:<10} " + ", ".join(f"{k} {n}" for k, n in sorted(counted.items())))

    # a folder without a table gives every image its own name as patient and study: that is not knowledge
    stated = any(r.patient != r.study for r in records)
    people = f"{len({r.patient for r in records})} patients, {len({r.study for r in records})} studies"
    progress.say(f"{collection.name}: {len(usable)} usable images, {people if stated else 'patients not stated'}, "
                 f"{len(skipped)} skipped")  # fmt: skip
    for note in collection.notes:
        progress.say(f"note: {note}")
    for split in sorted({r.split for r in records} - {""}):
        try:
            collection.split(split)
        except DataError as error:
            progress.say(f"warning: {error}")
    count("split", [r.split for r in records])
    count("view", [r.view for r in records])
    count("sex", [r.sex for r in records])
    ages = sorted(r.age for r in records if r.age is not None)
    if ages:
        progress.say(f"{'age':<10} {ages[0]:.0f} to {ages[-1]:.0f}, median {ages[len(ages) // 2]:.0f}, "
                     f"unknown {len(records) - len(ages)}")  # fmt: skip
    for finding in collection.findings:
        known = [r.labels[finding] for r in records if finding in r.labels]
        boxes = sum(b.finding == finding for r in records for b in r.boxes)
        progress.say(f"  {finding:<20} {sum(known):>7} of {len(known)} images" + (f", {boxes} boxes" if boxes else ""))
    for item in skipped[:5]:
        progress.say(f"skipped {item.image}: {item.reason}")
    if len(skipped) > 5 and not plain["skipped"]:
        progress.say(f"... and {len(skipped) - 5} more; --skipped FILE writes them all")
    if plain["skipped"]:
        write_skipped(Path(plain["skipped"]), skipped)
        progress.say(f"all skipped images: {plain['skipped']}")
    return 0


def data_estimate(words: Sequence[str]) -> int:
    """otcxr data estimate SOURCE, with the settings of a training."""
    from otcxr.estimate import estimate_training
    from otcxr.packing import PackConfig
    from otcxr.settings import config_from_plain

    words = whole_method(words)
    if words and not words[0].startswith("-"):
        words = ["--data.source", words[0], *words[1:]]
    parser = make_parser(
        "data estimate",
        "Try some images of a source, and some steps of a training with the "
        "settings that follow; say what it would take. otcxr data estimate SOURCE [settings]",
    )
    add_training(parser, words)
    add_settings(parser, "pack", PackConfig)
    parser.add_argument("--sample", type=int, default=32, help="images that are tried")
    plain = parsed(parser, words)
    to_log()
    progress = RichProgress()
    config = config_from_plain({name: value for name, value in plain.items() if name not in ("pack", "sample")})
    found = estimate_training(config, read_settings(PackConfig, plain["pack"]), plain["sample"], progress)
    for line in found.lines():
        progress.say(line)
    return 0


def data_preview(words: Sequence[str]) -> int:
    """otcxr data preview SOURCE, or --config of a training."""
    from otcxr.config import from_files
    from otcxr.data.view_spec import ViewsConfig
    from otcxr.methods import METHODS, find_method
    from otcxr.preview import preview_views

    words = whole_method(words)
    files = from_files(words)
    name = peek(words, "method.name", "otcxr")
    shown = {**find_method(name).views, **{k[6:]: v for k, v in files.items() if k.startswith("views.")}}
    parser = make_parser("data preview", "Draw the views that training would make of a source's first radiographs.")
    parser.add_argument("source", type=str, nargs="?", default=files.get("data.source", ""),
                        help="READER:ARGUMENT, such as nih:PATH (default: data.source of --config)")  # fmt: skip
    parser.add_argument("--config", type=str, help="YAML file of a training, or the config.yaml of a run; its views, "
                        "method, seed and source are taken, later options override them")  # fmt: skip
    parser.add_argument("--method.name", type=str, default=name,
                        help=f"whose default views are taken: {', '.join(METHODS)}; also --method")  # fmt: skip
    parser.add_argument("--out", type=str, default="preview.png", help="a .png file, or a folder for preview.png")
    parser.add_argument("--images", type=int, default=4, help="how many radiographs")
    parser.add_argument("--split", type=str, default=files.get("data.split", "train"),
                        help="split to look at, if the source has splits")  # fmt: skip
    parser.add_argument("--seed", type=int, default=files.get("seed", 0),
                        help="of the run: the same views as in its first epoch")  # fmt: skip
    add_settings(parser, "views", read_settings(ViewsConfig, shown))
    plain = parse(parser, words, whole_files=False).as_dict()
    if not plain["source"]:
        raise ConfigError("nothing to look at; name a source, such as nih:PATH, or a --config that has data.source")
    progress = RichProgress()
    path = preview_views(
        plain["source"], plain["out"], read_settings(ViewsConfig, plain["views"]), images=plain["images"],
        seed=plain["seed"], split=plain["split"], title=f"{plain['source']}, {name}, seed {plain['seed']}",
        progress=progress,
    )  # fmt: skip
    progress.say(f"written: {path}")
    return 0


def pack(words: Sequence[str]) -> int:
    """otcxr pack SOURCE OUT."""
    from otcxr.packing import PackConfig, pack_collection

    parser = make_parser(
        "pack", "Decode and reduce every image of a source once. Goes on where it was stopped; run again, it adds what "
        "is new.",
    )  # fmt: skip
    parser.add_argument("source", type=str, help="READER:ARGUMENT, such as nih:PATH")
    parser.add_argument("out", type=str, help="folder of the pack; read it as pack:OUT")
    parser.add_argument("--key", type=str, default="", help="file of the site's key, under which names are hashed "
                        "(default: site.key in the user's configuration folder, made on first use)")  # fmt: skip
    add_settings(parser, "", PackConfig)
    plain = parsed(parser, words)
    to_log()
    progress = RichProgress()
    source, out, key = plain.pop("source"), plain.pop("out"), plain.pop("key")
    config = read_settings(PackConfig, plain)
    packed = pack_collection(source, out, config, key=Path(key) if key else None, progress=progress)
    progress.say(
        f"{packed.path}: {packed.rows:,} radiographs ({packed.new:,} new), {packed.aliases:,} of them with the "
        f"pixels of another, {len(packed.skipped):,} left out, {len(packed.conflicts):,} contradictions"
    )
    for item in packed.skipped[:5]:
        progress.say(f"left out {item.image}: {item.reason}")
    if len(packed.skipped) > 5:
        progress.say(f"... and {len(packed.skipped) - 5} more in {packed.path / 'quarantine.csv'}")
    progress.say(f"use it: --data.source pack:{packed.path}")
    return 0
