"""A runtime as one object: what it lacks, how its sessions are opened, its file passes, its rules and its extra.

``compile``, ``bench``, ``tune_placement``, ``export_onnx``, ``doctor`` and the tests read these objects and know no runtime
by name. To add one, fill a ``Runtime`` and ``register`` it, from inside the package or from outside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from torch import Tensor

from fxquant.errors import ExportError, InputError, Refusal, SchemeError
from fxquant.installed import is_installed, require
from fxquant.targets import TARGETS, Target

__all__ = ["RUNNABLE", "RUNTIMES", "Deployed", "File", "Rule", "Run", "Runtime", "Session", "register", "runtime_of"]

Session = Callable[[Sequence[Tensor]], list[Tensor]]
"""A file in a runtime: from the tensors that it takes to those that it gives, each in the file's order."""
Run = Callable[..., Any]
"""A model in a runtime, called as the model is."""
Rule = Callable[[Any], "list[Any]"]
"""From a file to what breaks the runtime's rules in it, each with a flag ``refused``."""


class FileModel(Protocol):
    """What a file was made from."""

    integer: Any
    """The integer model."""
    signature: Any
    """From a call of the model to the file's tensors, and from its results to the model's."""
    inputs: list[Tensor]
    """The example's tensors."""
    float_dtype: str
    """What the recipe lets a runtime compute floats in."""

    def tensor_bits(self) -> set[int]:
        """The widths of the rounded tensors."""


class File(Protocol):
    """A file for runtimes."""

    @property
    def source(self) -> Any:
        """Its bytes, or its path where it has tensors beside it."""

    @property
    def model(self) -> Any:
        """What it was made from, a ``FileModel``."""


class Deployed(Protocol):
    """A model that was made ready once; each form is made when it is first asked for, and kept."""

    @property
    def integer(self) -> Any:
        """The integer model."""

    @property
    def call(self) -> Any:
        """The example, a ``Call``; None where none is known."""

    def file(self) -> Any:
        """The ONNX file, a ``File``."""


def _same(integer: Any) -> Run:
    run: Run = integer
    return run


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One place where a quantized model can run.

    A runtime that takes files has ``session``; one that takes the integer model itself has ``open``; one that fxquant only
    writes files for has neither, and says in ``instead`` how to get there.

    Example:
        >>> mine = dataclasses.replace(runtime_of("onnxruntime"), name="mine", title="Mine")

    Args:
        name: as ``compile`` calls it.
        title: how people call it.
        target: what it computes in integers, on which grids, and where it wants tensors rounded.
        session: from a file's source and a number of threads (None for its own choice) to a ``Session``.
        open: from a ``Deployed`` and a number of threads to a ``Run``; made of ``session`` where None.
        alone: from the integer model to what ``bench`` measures the memory of, for a runtime without ``session``.
        instead: what to do where nothing here runs it.
        package: what is imported to run it; empty where nothing is.
        extra: the extra of fxquant that brings the package.
        found: the version of its package, or of what else brings it; None to ask the package's metadata.
        status: what it gives on this processor, told whether sums of two products saturate here.
        no_placement: why ``tune_placement`` has nothing to choose for it; None where it has.
        bfloat16: whether it computes floats in bfloat16 on this processor; None where it has no kernels for that.
        file_passes: passes over an ``onnx_ir.Model``, each from the model to whether it changed, run in order on files for
            models prepared for ``target``.
        file_rules: what a file is held against at export where a target's ``file_rules`` names this runtime.
    """

    name: str
    title: str
    target: Target
    session: Callable[..., Session] | None = None
    open: Callable[[Any, int | None], Run] | None = None
    alone: Callable[[Any], Run] = _same
    instead: str = ""
    package: str = ""
    extra: str = ""
    found: Callable[[], str] | None = None
    status: Callable[[bool], str] | None = None
    no_placement: Refusal | None = None
    bfloat16: Callable[[], bool] | None = None
    file_passes: tuple[Callable[[Any], object], ...] = ()
    file_rules: Rule | None = None

    @property
    def runs(self) -> bool:
        """Whether ``compile`` runs models in it."""
        return self.session is not None or self.open is not None

    @property
    def takes_file(self) -> bool:
        """Whether it runs a file, not the integer model itself."""
        return self.session is not None

    @property
    def how_to_install(self) -> str:
        """The command that brings its package."""
        return f"pip install 'fxquant[{self.extra}]'" if self.extra else f"pip install {self.package}"

    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        return not self.package or is_installed(self.package)

    def version(self) -> str:
        """Of its package; empty where that is not installed."""
        try:
            return version(self.package) if self.found is None else self.found()
        except PackageNotFoundError:
            return ""

    def compiled(self, model: Deployed, threads: int | None) -> Run:
        """``model`` in this runtime, called as the model is.

        Raises:
            InputError: nothing here runs it.
            MissingPackageError: it is not installed.
            ExportError: it does not take the model; says why.
        """
        if not self.runs:
            raise InputError(
                f"runtime={self.name!r}: compile does not run models in {self.title}.\n"
                f"  what to do: {self.instead or 'choose one of ' + ', '.join(RUNNABLE)}."
            )
        if self.package:
            require(self.package, f"runtime={self.name!r}", self.extra)
        if self.open is not None:
            return self.open(model, threads)
        assert self.session is not None
        return opened(self.session, model.file(), threads)


def opened(session: Callable[..., Session], file: File, threads: int | None, **options: Any) -> Run:
    """A file in a session, called as the model that it was made from; called once, since some compile only then."""
    own, model = session(file.source, threads, **options), file.model
    run_session(own, model.inputs)
    return partial(_called, own, model.signature)


def _called(session: Session, signature: Any, *args: Any, **kwargs: Any) -> Any:
    tensors: list[Tensor] = signature.tensors(args, kwargs)
    return signature.restore(run_session(session, tensors))


def run_session(session: Session, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Run ``session``; what it says when it fails becomes an error of ours.

    Raises:
        InputError: the runtime refuses these inputs.
        ExportError: it refuses the file, which some say when they are first called.
    """
    try:
        return session(tensors)
    except ExportError:
        raise
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in tensors)
        raise InputError(f"the runtime refuses inputs of shapes {shapes}: {error}") from error


RUNTIMES: dict[str, Runtime] = {}
"""Every runtime by name, open: ``register`` enters one of your own. The first runs every model."""


def register(runtime: Runtime) -> Runtime:
    """Enter ``runtime``, and its target, so that every verb knows them by name; one of the same name is replaced.

    Example:
        >>> mine = register(dataclasses.replace(runtime_of("onnxruntime"), name="mine", title="Mine"))
        >>> logits = fxquant.compile(int8, images, runtime="mine")(images)

    Raises:
        SchemeError: its target has the name of another one.
    """
    known = TARGETS.get(runtime.target.name)
    owned = any(own.target is known for name, own in RUNTIMES.items() if name != runtime.name)
    if known is not None and known is not runtime.target and (owned or runtime.name not in RUNTIMES):
        raise SchemeError(
            f"runtime {runtime.name!r} has a target named {known.name!r}, which is another target's name.\n"
            "  what to do: give its target a name of its own, or share the known one: fxquant.targets.get(name)."
        )
    RUNTIMES[runtime.name] = runtime
    TARGETS[runtime.target.name] = runtime.target
    return runtime


class _Runnable(Mapping[str, Runtime]):
    def __getitem__(self, name: str) -> Runtime:
        own = RUNTIMES[name]
        if not own.runs:
            raise KeyError(name)
        return own

    def __iter__(self) -> Iterator[str]:
        return (name for name, own in RUNTIMES.items() if own.runs)

    def __len__(self) -> int:
        return sum(own.runs for own in RUNTIMES.values())


RUNNABLE: Mapping[str, Runtime] = _Runnable()
"""Those of ``RUNTIMES`` that ``compile`` runs models in, at any time."""


def runtime_of(name: str, *, also: Sequence[str] = ()) -> Runtime:
    """A runtime by name.

    Example:
        >>> runtime_of("tensorrt").runs
        False

    Raises:
        InputError: there is none of that name; ``also`` are other words that would do.
    """
    if name in RUNTIMES:
        return RUNTIMES[name]
    raise InputError(f"runtime={name!r} is not known. Choose one of {', '.join((*RUNNABLE, *also))}.")
