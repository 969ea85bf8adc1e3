"""A folder of a store as a source."""

from collections.abc import Iterator

from data_prep.format.storage import RemotePath
from data_prep.sources.files import SourceFile, UnreadableFileError


class RemoteFolderSource:
    """What lies below a URL, one folder listed after the other in the order of their names."""

    chosen = False
    classes: tuple[str, ...] | None = None

    def __init__(self, path: RemotePath) -> None:
        self.path = path

    def files(self) -> Iterator[SourceFile]:
        """Yield every file.

        Raises:
            StorageError: the store does not answer.
        """
        for path, size, stamp in self.path.walk():
            yield SourceFile(path, size, stamp)

    def outline(self) -> Iterator[SourceFile]:
        """Yield every file; a store that names it tells its length as well."""
        return self.files()

    def describe(self, path: str) -> tuple[int, int]:
        """Return the length of a file in bytes, and what changes with its content.

        Raises:
            FileNotFoundError: it is not there.
            StorageError: the store does not answer.
        """
        return (self.path / path).describe()

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of a file.

        Raises:
            UnreadableFileError: it is gone or may not be read.
            StorageError: the store does not answer.
        """
        try:
            return (self.path / file.path).read_bytes()
        except OSError as error:
            reason = error.strerror or "it is not there"
            raise UnreadableFileError(f"cannot be read: {reason}") from None

    def close(self) -> None:
        """Nothing is held open."""
