"""Folders of WebDataset tars as sources, for resharding."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from data_prep.format.manifest import IMAGE_EXTENSIONS, MANIFEST_NAME, read_manifest
from data_prep.format.storage import ByteReader, Location
from data_prep.format.tars import describe_problem, walk_tar
from data_prep.sources.files import Selection, SourceError, SourceFile, UnreadableFileError

_MAX_METADATA_BYTES = 2**20


class ShardSource:
    """A folder of WebDataset tars, read by sample with its label, JSON fields and key."""

    is_explicit = True

    def __init__(self, path: Location, selection: Selection) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        self._split_column = selection.split_column
        self._open: tuple[str, ByteReader] | None = None
        self.classes: tuple[str, ...] | None = None
        if (path / MANIFEST_NAME).exists():
            self.classes = read_manifest(path).classes or None

    def files(self) -> Iterator[SourceFile]:
        """Yield the image of every sample; those that cannot be used have a problem.

        Raises:
            SourceError: there are no tars.
            TarError: a tar is damaged.
        """
        tars = sorted(path.name for path in self.path.glob("*.tar") if path.name[0] != ".")
        if not tars:
            raise SourceError(f"{self.path} has no tars. Give a folder of WebDataset tars.")
        for name in tars:
            yield from self._samples(name)

    def unmeasured_files(self) -> Iterator[SourceFile]:
        """Yield the image of every sample; labels are in the tars, so these are read anyway."""
        return self.files()

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of an image.

        Raises:
            UnreadableFileError: the tar is missing or truncated.
        """
        try:
            data = self._reader(file.container).read(file.offset, file.size)
        except OSError as error:
            raise UnreadableFileError(f"cannot be read: {error.strerror or error}") from None
        if len(data) != file.size:
            raise UnreadableFileError("the tar is truncated")
        return data

    def close(self) -> None:
        """Close the tar read last."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _reader(self, name: str) -> ByteReader:
        if self._open is None or self._open[0] != name:
            self.close()
            self._open = (name, ByteReader(self.path / name))
        return self._open[1]

    def _samples(self, name: str) -> Iterator[SourceFile]:
        key, images, metadata = "", list[SourceFile](), dict[str, bytes]()
        with closing(ByteReader(self.path / name)) as tar:
            for member in walk_tar(self.path / name):
                folder, slash, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if member.isdir() or not dot or not stem or member.name.startswith("__"):
                    continue
                if folder + slash + stem != key:
                    yield from self._finish(name, key, images, metadata)
                    key, images, metadata = folder + slash + stem, [], {}
                extension = extension.lower()
                if extension in IMAGE_EXTENSIONS:
                    images.append(
                        SourceFile(
                            path=f"{name}/{member.name}",
                            size=member.size,
                            stamp=int(member.mtime),
                            offset=member.offset_data,
                            problem=describe_problem(member) or "",
                            container=name,
                        )
                    )
                elif extension in ("cls", "json") and member.isreg():
                    length = min(member.size, _MAX_METADATA_BYTES)
                    metadata[extension] = tar.read(member.offset_data, length)
        yield from self._finish(name, key, images, metadata)

    def _finish(
        self, name: str, key: str, images: list[SourceFile], metadata: dict[str, bytes]
    ) -> Iterator[SourceFile]:
        if not images:
            if key:
                yield SourceFile(f"{name}/{key}", 0, 0, problem="its sample has no image")
            return
        images = _leave_out_arrays(images)
        fields = _parse_fields(metadata.get("json", b"{}"))
        label = metadata.get("cls", b"").decode("utf-8", "replace").strip()
        first, *others = images
        first = first._replace(label=label)
        if fields is None:
            fields, first = {}, first._replace(problem="its JSON is damaged")
        if label:
            first = self._name_class(first, label)
        path, split = fields.pop("path", None), fields.get(self._split_column, "")
        if isinstance(path, str) and path:
            first = first._replace(path=path)
        first = first._replace(
            split=split if isinstance(split, str) else "", fields=json.dumps({**fields, "key": key})
        )
        yield first
        for other in others:
            yield other._replace(problem=f"its sample {key!r} has another image already")

    def _name_class(self, file: SourceFile, label: str) -> SourceFile:
        if self.classes is None:
            return file._replace(label=label)
        if label.isascii() and label.isdecimal() and int(label[:9]) < len(self.classes):
            return file._replace(label=self.classes[int(label[:9])])
        return file._replace(problem=f"its label {label[:40]!r} is no class of the manifest")


def _leave_out_arrays(images: list[SourceFile]) -> list[SourceFile]:
    """Return the pictures of a sample, or its array if it has none, as the index does."""
    pictures = [file for file in images if not file.path.lower().endswith(".npy")]
    return pictures or images


def _parse_fields(data: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else {"json": values}
