"""What is written to disk: a graph, and its tensors beside it where one protobuf cannot hold them.

    model.onnx         the graph, and every tensor of up to 1 KiB
    model.onnx.data    the others, at the places that the graph says

Source: ONNX, *External Data*; protobuf's limit of 2 GiB a message.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

from fxquant.errors import ExportError, InputError
from fxquant.installed import require

__all__ = ["Folder", "Pair", "checked_path", "put", "replacing", "serialized"]

LARGEST_PROTOBUF = 2**31 - 2**26
"""The bytes of tensors that one file may hold: protobuf's limit, less what the graph itself may take."""
_LARGEST_INSIDE = 1024
"""A tensor of more bytes lies beside the graph, where there is such a place."""


class Folder:
    """A new folder, removed with what is left in it by ``close``, or when nothing holds this any more.

    Args:
        within: where it is made; None for the system's place for temporary files.

    Raises:
        ExportError: it cannot be made.
    """

    def __init__(self, within: str | None = None) -> None:
        try:
            self.path = tempfile.mkdtemp(prefix=".fxquant-", dir=within)
        except OSError as error:
            where = within or "the folder for temporary files"
            remedy = (
                "choose a folder that you may write to" if within else "set TMPDIR to a folder that you may write to"
            )
            raise ExportError(f"nothing can be written into {where}: {error}\n  what to do: {remedy}.") from error
        self.close = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def __truediv__(self, name: str) -> str:
        return os.path.join(self.path, name)


class Pair(os.PathLike[str]):
    """A graph on disk with its tensors beside it.

    Args:
        path: the graph's file; the other has its name and ``.data``.
        folder: what holds the two and goes with this; None where others see to that.
    """

    def __init__(self, path: str, folder: Folder | None) -> None:
        self.path, self.data, self.folder = path, _data_of(path), folder

    def __fspath__(self) -> str:
        return self.path


def serialized(model: Any, external_data: bool | None, at: str | None) -> tuple[bytes, Pair | None]:
    """The graph of ``model`` (an ``onnx_ir.Model``) as bytes, and both files where its tensors are not among these.

    Args:
        model: changed: tensors that are written are read from there.
        external_data: whether tensors lie in a file of their own; None for where they have to.
        at: where the pair is written; None for a temporary folder that lives as long as the pair.

    Raises:
        ExportError: the pair cannot be written, or one file is asked for and cannot hold the tensors.
    """
    import onnx_ir as ir

    sizes = [value.const_value.nbytes for value in _constants(model)]
    if external_data is False and sum(sizes) > LARGEST_PROTOBUF:
        raise ExportError(
            f"the tensors have {sum(sizes) / 2**30:.2f} GiB, and one ONNX file ends at {LARGEST_PROTOBUF / 2**30:.2f}.\n"
            "  what to do: leave external_data out, and they are written into a file beside the graph."
        )
    wanted = external_data or sum(sizes) > LARGEST_PROTOBUF
    if not wanted or max(sizes, default=0) <= _LARGEST_INSIDE:
        return _protobuf(model), None
    pair = _temporary() if at is None else Pair(at, None)
    with _refusals(pair.path):
        place, name = os.path.split(pair.data)
        ir.external_data.unload_from_model(model, place, name, size_threshold_bytes=_LARGEST_INSIDE)
        content = _protobuf(model)
        _write(pair.path, content)
    return content, pair


def _temporary() -> Pair:
    folder = Folder()
    return Pair(folder / "model.onnx", folder)


def _constants(model: Any) -> Iterator[Any]:
    for graph in model.graphs():
        yield from (value for value in graph.initializers.values() if value.const_value is not None)


def _protobuf(model: Any) -> bytes:
    import onnx_ir as ir

    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # shapes between nodes follow from those of the inputs; written out they are 1 to 3 %
    return bytes(proto.SerializeToString())


def checked_path(path: str | os.PathLike[str], ending: str = ".onnx") -> str:
    """``path`` as text, where a file can be put there.

    Raises:
        InputError: it is no path; or its name, or the place, is not one for a file with that ``ending``.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(
            f"a {type(path).__name__} was given where the path of a file belongs.\n"
            f"  what to do: give the path behind the model, and the example behind that: (model, 'name{ending}', images)."
        )
    target = os.fspath(path)
    if not target.endswith(ending):
        raise InputError(
            f"{target!r} does not end in {ending}, by which runtimes know the format. Name the file …{ending}."
        )
    folder = os.path.dirname(os.path.abspath(target))
    if not os.path.isdir(folder):
        raise InputError(f"there is no folder {folder!r} to write {os.path.basename(target)!r} into. Make it first.")
    if os.path.isdir(target):
        raise InputError(f"{target!r} is a folder, which a file cannot replace. Choose another name, or move it away.")
    return target


@contextlib.contextmanager
def replacing(target: str) -> Iterator[str]:
    """A path to write to: what is there in the end replaces the file at ``target``; nothing does if the block fails.

    Raises:
        ExportError: it cannot be written; what was there is as it was.
    """
    with contextlib.closing(Folder(os.path.dirname(os.path.abspath(target)))) as folder:
        new = folder / os.path.basename(target)
        with _refusals(target):
            yield new
            os.replace(new, target)


def put(content: bytes, pair: Pair | None, target: str, folder: Folder) -> None:
    """Put a file, or a pair that lies in ``folder``, in place of what is at ``target``: all of it or nothing.

    An older graph is away before the tensors that it reads change, so that at no time do two that are not of one model
    lie beside each other; tensors that only an older graph read go with it.

    Args:
        content: the graph.
        pair: where it lies with its tensors; None where it holds them.
        target: the path.
        folder: on the same file system, for what is not in place yet and what is not any more.

    Raises:
        ExportError: it cannot be done; what was there is as it was.
    """
    data, new, moved = _data_of(target), folder / "new.onnx", list[tuple[str, str]]()
    if pair is not None and os.path.isdir(data):
        raise ExportError(
            f"{data!r} is a folder, and the tensors of {os.path.basename(target)!r} go into a file of that name.\n"
            "  what to do: choose another name for the file, or move the folder away."
        )
    with _refusals(target):
        if pair is None:
            _write(new, content)
        replaced = [target] if (reads := _reads(target, os.path.basename(data))) else []
        replaced += [data] if os.path.isfile(data) and (reads or pair is not None) else []
        try:
            for path in replaced:
                moved.append((path, folder / f"old{len(moved)}"))
                os.replace(*moved[-1])
            if pair is not None:
                os.replace(pair.data, data)
            os.replace(new if pair is None else pair.path, target)
        except BaseException:
            if pair is not None and not os.path.exists(pair.data):
                os.replace(data, pair.data)
            for path, old in moved:
                if os.path.exists(old):
                    os.replace(old, path)
            raise


def _reads(path: str, data: str) -> bool:
    """Whether the graph at ``path`` has tensors in the file ``data`` beside it."""
    onnx: Any = require("onnx", "reading an ONNX file", "onnx")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # there is none, or it is something else
        return False
    return any(entry.value == data for tensor in graph.initializer for entry in tensor.external_data)


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def _data_of(path: str) -> str:
    return f"{path}.data"


@contextlib.contextmanager
def _refusals(path: str) -> Iterator[None]:
    """What the system says when it does not write becomes an error of ours."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{os.path.basename(path)!r} could not be written: {error}\n"
            "  what to do: see to the space and the rights in that folder, or choose another; what was there is as it was."
        ) from error
