"""Checks of shards and image folders: files, checksums, and a sample of decoded images."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.format.manifest import ShardEntry
from data_prep.format.storage import Location
from data_prep.format.text import count_noun, count_range, format_bytes
from simmim.data.datasets.folder import ImageFolder
from simmim.data.datasets.image_set import ImageSet
from simmim.data.datasets.mixture import MixedShards, Shards, StreamedShards
from simmim.data.datasets.shards import ShardSet
from simmim.data.order.order import (
    MAX_SLOTS,
    WHOLE_SHUFFLE_LIMIT,
    Order,
    describe_order,
    needless_slots,
)
from simmim.data.settings import AugmentedDataSettings
from simmim.data.transforms.sampling import SampledImages, sample_images
from simmim.doctor.checks import Check
from simmim.environment import available_cores, process_environment
from simmim.tasks.input_check import EncoderInput, compare_input

CHECKSUM_BYTES = 2**31
"""Largest shard that is checksummed. First, middle and last shard of each set are."""
DECODED = 256
"""Maximum number of samples that are decoded."""
DECODING_SECONDS = 20.0
MANY_FILES = 2_000_000
"""Files in a folder from which shards are advised."""
SMALL_SHARE = 0.1
_OTHERS = "name indexed shards or a folder of images as data.validation"
FEW_SLOTS = 8
"""Slots of a large set below which its batches are poorly mixed."""


def check_shards(
    training: Shards | StreamedShards,
    validation: Shards | None,
    data: AugmentedDataSettings,
    wanted: EncoderInput,
) -> Iterator[Check]:
    """Check the training and validation shards, and the first samples of a stream."""
    tars = [entry for one in shard_sets_of(training) for entry in entries_of(one)]
    there = f" ({format_bytes(sum(entry.bytes for entry in tars))})" if tars else ""
    yield Check(
        name="shards",
        verdict="ok",
        found=f"{_samples_in_shards(training)}{there} to train on",
    )
    yield from check_folders(training)
    if isinstance(training, StreamedShards):
        readers = process_environment().world * max(1, data.workers)
        yield Check(name="stream", verdict="ok", found=training.describe(readers))
    if validation is None or not validation.samples:
        yield Check(
            name="validation",
            verdict="warning",
            found="no shard is held out, so there is no validation loss",
            change=("set data.validation_shards to 1 or more" if sets_of(training) else _OTHERS)
            + ": that loss predicts fine-tuning",
        )
    else:
        yield Check(
            name="validation",
            verdict="ok",
            found=_samples_in_shards(validation),
        )
    entries: dict[Location, list[ShardEntry]] = {}
    for one in [*shard_sets_of(training), *(shard_sets_of(validation) if validation else [])]:
        entries.setdefault(one.folder, []).extend(entries_of(one))
    for folder, of_folder in entries.items():
        yield check_files(folder, of_folder)
    yield from check_samples(training, data, wanted)


def _samples_in_shards(shards: Shards | StreamedShards) -> str:
    samples = count_noun(shards.samples, "sample")
    if not shard_sets_of(shards):  # a folder's parts are nothing to the user
        return samples
    return f"{samples} in {count_noun(len(shards.sizes), 'shard')}"


def sets_of(shards: Shards | StreamedShards) -> tuple[ImageSet, ...]:
    """Return the indexed sets of a mixture, or the one set."""
    return shards.sets if isinstance(shards, MixedShards | StreamedShards) else (shards,)


def shard_sets_of(shards: Shards | StreamedShards) -> list[ShardSet]:
    """Return the sets that have shards."""
    return [one for one in sets_of(shards) if isinstance(one, ShardSet)]


def check_order(order: Order, batch_size: int) -> Check:
    """Report how epochs are shuffled, and warn of slots that leave out samples or are too few."""
    found, change = describe_order(order), ""
    if needless_slots(order):
        change = "remove data.slots: up to 65,536 images need none, and all are trained on"
    elif order.samples > WHOLE_SHUFFLE_LIMIT and order.slots < FEW_SLOTS <= batch_size:
        found += f", as the batch size of {batch_size:,} has no larger divisor up to {MAX_SLOTS}"
        change = (
            f"set training.batch_size to a multiple of {FEW_SLOTS} or more: a batch takes its "
            "samples from as many places of the set as there are slots"
        )
    return Check(name="order", verdict="warning" if change else "ok", found=found, change=change)


def check_folders(shards: Shards | StreamedShards) -> Iterator[Check]:
    """Report image folders, and warn of very large ones."""
    for one in sets_of(shards):
        if not isinstance(one, ImageFolder):
            continue
        classes = ", ".join(one.classes[:3]) + (", …" if len(one.classes) > 3 else "")
        many = one.samples > MANY_FILES
        yield Check(
            name="images",
            verdict="warning" if many else "ok",
            found=f"{count_noun(one.samples, 'file')} in {one.folder}, "
            f"{count_noun(len(one.classes), 'class', 'classes')}"
            + (f": {classes}" if classes else ""),
            change="write them as shards with `data-prep shard`: every process lists all "
            "files, and opens them one by one"
            if many
            else "",
        )


def entries_of(shards: ShardSet) -> list[ShardEntry]:
    """Return the manifest entries of these shards."""
    return [shards.manifest.shards[number] for number in shards.numbers]


def check_files(folder: Location, entries: Sequence[ShardEntry]) -> Check:
    """Compare the local files of a set with the manifest: all sizes, a few checksums."""
    places = [(entry, entry.location(folder)) for entry in entries]
    local = [(entry, place) for entry, place in places if isinstance(place, Path)]
    if not local:
        return Check(name="files", verdict="ok", found=f"{folder} is not on this machine")
    wrong, whole = [], []
    for entry, place in local:
        try:
            size = place.stat().st_size
        except OSError as error:
            wrong.append(f"{place}: {error.strerror}")
            continue
        if size == entry.bytes:
            whole.append((entry, place))
        else:
            wrong.append(f"{place}: {size:,} of {entry.bytes:,} bytes")
    chosen = sorted({0, len(whole) // 2, len(whole) - 1}) if whole else []
    for entry, place in (whole[number] for number in chosen):
        if entry.bytes <= CHECKSUM_BYTES and _sha256(place) != entry.sha256:
            wrong.append(f"{place}: the checksum differs from the manifest")
    if wrong:
        more = f"\nand {len(wrong) - 5:,} more" if len(wrong) > 5 else ""
        return Check(
            name="files",
            verdict="problem",
            found="\n".join(wrong[:5]) + more,
            change="copy them again, or make them again with `data-prep shard`; "
            "`data-prep verify` checks all",
        )
    return Check(
        name="files",
        verdict="ok",
        found=f"all {len(local):,} in {folder} are complete; {len(chosen)} checksums verified",
    )


def _sha256(place: Path) -> str:
    digest = hashlib.sha256()
    with place.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def check_samples(
    shards: Shards | StreamedShards, data: AugmentedDataSettings, wanted: EncoderInput
) -> Iterator[Check]:
    """Decode some samples, and compare sizes, channels and statistics with the recipe."""
    found = sample_images(
        shards,
        channels=wanted.channels,
        data=data,
        most=DECODED,
        seconds=DECODING_SECONDS,
    )
    share = len(found.bad) / max(found.count, 1)
    rate = found.count / max(found.seconds, 1e-9)
    text = f"{found.count:,} decoded at {rate:,.0f} images/s in one process"
    if found.bad:
        text += f"; {len(found.bad)} damaged ({share:.1%}), the first {found.bad[0]}"
    yield Check(
        name="samples",
        verdict="problem" if share > data.max_bad_share else "warning" if found.bad else "ok",
        found=text,
        change="write the images as shards with `data-prep shard`, which rejects such images; "
        "`data-prep verify --deep` lists all damaged images of a set"
        if found.bad
        else "",
    )
    if not found.short_sides:
        return
    yield _check_sizes(found, data)
    yield from input_checks(found, wanted)


def input_checks(found: SampledImages, wanted: EncoderInput) -> Iterator[Check]:
    """Compare channels, range and statistics of images with what the encoder takes."""
    for one in compare_input(found, wanted):
        yield Check(name=one.name, verdict=one.verdict, found=one.found, change=one.change)


def _check_sizes(found: SampledImages, data: AugmentedDataSettings) -> Check:
    sides = np.array(found.short_sides)
    small = float((sides < data.image_size).mean())
    text = f"short sides {count_range(sides.min(), sides.max())} pixels"
    if sides.min() < sides.max():
        text += f", median {np.median(sides):.0f}"
    text += f"; crops of {data.image_size}"
    if small > SMALL_SHARE:
        return Check(
            name="image sizes",
            verdict="warning",
            found=f"{text}; {small:.0%} of the images are smaller and will be enlarged",
            change="lower data.image_size, or use larger images",
        )
    return Check(name="image sizes", verdict="ok", found=text)


def check_workers(workers: int) -> Check:
    """Compare the number of worker processes on this machine with its cores."""
    cores = available_cores()
    ranks = process_environment().local_world
    found = (
        f"{workers} per process, {count_noun(ranks, 'process', 'processes')}, "
        f"{count_noun(cores, 'core')}"
    )
    if workers * ranks > cores:
        return Check(
            name="workers",
            verdict="warning",
            found=found,
            change=f"lower data.workers to {max(1, cores // ranks)}, at most one per core",
        )
    return Check(name="workers", verdict="ok", found=found)
