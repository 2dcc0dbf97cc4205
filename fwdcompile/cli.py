"""The command line: `fwdcompile train`, `show`, `rules` and `calibrate`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from . import data as data_sets
from . import rule
from .config import DIRECTIONS, NAMES, OPTIMIZERS, PERTURBED, Config, parsed
from .costs import best_form
from .data import Dataset, import_torchvision, load
from .errors import FwdcompileError
from .functional import transform
from .graph import draw
from .models import MODELS
from .report import BASES, Report, plot
from .runner import Runner
from .workers import SHARES, Workers, joined, restarted

DEFAULT_INPUT = "1,3,64,64"

app = typer.Typer(
    help="Forward-mode automatic differentiation for PyTorch, by source transformation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help=f"one of {', '.join(MODELS)}")],
    data: Annotated[str, typer.Option(help=", ".join(data_sets.NAMES))] = "digits",
    data_root: Annotated[Path | None, typer.Option(help="directory of torchvision's sets")] = None,
    download: Annotated[bool, typer.Option(help="fetch a set that is not there")] = True,
    methods: Annotated[
        str,
        typer.Option(
            help=f"separated by commas: {', '.join(NAMES)}; each may have settings of its own, "
            "as fgd:lr=1e-3:samples=16"
        ),
    ] = ",".join(Config.methods),
    iterations: Annotated[int, typer.Option(help="steps of each method")] = Config.iterations,
    batch: Annotated[int, typer.Option(help="images a step")] = Config.batch,
    lr: Annotated[float, typer.Option(help="learning rate at iteration 0")] = Config.lr,
    decay: Annotated[float, typer.Option(help="k in lr exp(-k i)")] = Config.decay,
    runs: Annotated[int, typer.Option(help="independent runs")] = Config.runs,
    seed: Annotated[int, typer.Option(help="of the first run")] = Config.seed,
    directions: Annotated[str, typer.Option(help=f"{', '.join(DIRECTIONS)}")] = Config.directions,
    rank_one: Annotated[
        bool, typer.Option("--rank-one", help="directions of weights are outer products")
    ] = Config.rank_one,
    samples: Annotated[
        str, typer.Option(help="directions a step; 1/16 for those of each layer's activations")
    ] = str(Config.samples),
    perturb: Annotated[str, typer.Option(help=" or ".join(PERTURBED))] = Config.perturb,
    optimizer: Annotated[str, typer.Option(help=", ".join(OPTIMIZERS))] = Config.optimizer,
    clip: Annotated[float, typer.Option(help="the most of a directional derivative")] = Config.clip,
    every: Annotated[
        int, typer.Option(help="steps between looks at the validation set, and checkpoints")
    ] = Config.every,
    compile: Annotated[bool, typer.Option(help="compile the fgd step")] = Config.compile,
    mode: Annotated[str, typer.Option(help="torch.compile's mode")] = Config.mode,
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="leave steps out that are not finite")
    ] = Config.skip_nonfinite,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="write TensorBoard's event files")
    ] = False,
    share: Annotated[
        str, typer.Option(help=f"what workers share, under torchrun: {' or '.join(SHARES)}")
    ] = Config.share,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from --out, maybe for more --runs")
    ] = False,
    out: Annotated[Path, typer.Option(help="directory for the log and the picture")] = Path("runs"),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1")] = "cpu",
) -> None:
    """Trains methods side by side on a data set and prints the paper's measures."""
    if model not in MODELS:
        raise ValueError(f"no model is called {model!r}; there are {', '.join(MODELS)}")
    config = Config(
        methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
        iterations=iterations,
        batch=batch,
        lr=lr,
        decay=decay,
        runs=runs,
        seed=seed,
        directions=directions,
        rank_one=rank_one,
        samples=parsed(int, f"--samples {samples}", samples),
        perturb=perturb,
        optimizer=optimizer,
        clip=clip,
        every=every,
        compile=compile,
        mode=mode,
        skip_nonfinite=skip_nonfinite,
        share=share,
    )
    with joined(device) as own:
        dataset = load(data, data_root, download=download).to(_device(own))

        def build() -> nn.Module:
            return MODELS[model](dataset.shape, dataset.classes)

        report = compare(build, dataset, config, out, tensorboard, resume or restarted())
        if not Workers().rank:
            Console().print(table(report))
            plot(report, out / "loss.png", f"{model} on {data}")


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="module:name of a module, factory or function")],
    input: Annotated[
        list[str] | None,
        typer.Option(help="shape of an input, as 1,3,64,64 or 2,16:int64; once for each"),
    ] = None,
    tangents: Annotated[
        str | None,
        typer.Option(help="parameters (a module's default), inputs, or names with commas"),
    ] = None,
    rank_one: Annotated[
        bool, typer.Option("--rank-one", help="tangents of weights are outer products")
    ] = False,
    lines: Annotated[str, typer.Option(help="a:b, which lines to print; from 1")] = ":",
    picture: Annotated[Path | None, typer.Option(help="draw the program to this file")] = None,
) -> None:
    """Prints the generated forward-mode program of any importable model."""
    first, last = _lines(lines)
    inputs = [_example(text) for text in input or [DEFAULT_INPUT]]
    target = _import(model)
    names = tangents or _usual_tangents(target)
    chosen = names if names in ("parameters", "inputs") else names.split(",")
    lowered = transform(target).lower(*inputs, tangents=chosen, rank_one=rank_one)
    text = "\n".join(lowered.code.splitlines()[first:last])
    if sys.stdout.isatty():
        Console().print(Syntax(text, "python", background_color="default"))
    else:
        typer.echo(text)
    if picture is not None:
        draw(lowered.graph(), picture)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="module:name of a module, factory or function")],
    input: Annotated[
        list[str] | None, typer.Option(help="shape of an input, as 64,1,28,28; once for each")
    ] = None,
    rank_one: Annotated[
        bool, typer.Option("--rank-one", help="tangents of weights are outer products")
    ] = False,
    samples: Annotated[int, typer.Option(help="directions a step")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1")] = "cpu",
) -> None:
    """Measures the products of a model; programs generated later take the fastest form of each."""
    target, where = _import(model), _device(device)
    if isinstance(target, nn.Module):
        target = target.to(where)
    inputs = [_example(text).to(where) for text in input or [DEFAULT_INPUT]]
    products = transform(target).calibrate(
        *inputs, tangents=_usual_tangents(target), directions=samples, rank_one=rank_one
    )
    for product in dict.fromkeys(products):
        typer.echo(f"{product.key}: {best_form(product)}")


@app.command(name="rules")
def list_rules(
    find: Annotated[str, typer.Argument(help="only ops whose name holds this")] = "",
) -> None:
    """Lists the rule table: op, word, arguments, where the row stands."""
    rows = sorted((str(op), row) for op, row in rule.table.items() if find in str(op))
    for name, row in rows:
        typer.echo(f"{name:55} {row.word:16} {', '.join(row.wrt)[:40]:42} {row.where}")
    typer.echo(f"{len(rows)} rows")


def compare(
    build: Callable[[], nn.Module],
    data: Dataset,
    config: Config,
    out: Path,
    tensorboard: bool = False,
    resume: bool = False,
) -> Report:
    """Runs a comparison under a progress bar; the arguments are those of `Runner`."""
    total = config.iterations * config.runs * len(config.methods)
    with tqdm(total=total, unit="step", dynamic_ncols=True, disable=Workers().rank > 0) as bar:

        def progress(method: str, steps: int) -> None:
            bar.set_description(method, refresh=False)
            bar.update(steps)

        options: dict[str, Any] = {"log": out, "tensorboard": tensorboard, "resume": resume}
        return Runner(build, data, config, **options, progress=progress).run()


def table(report: Report) -> Table:
    """The report as a table for a terminal."""
    bases = {name: report.step_seconds(name) for name in BASES.values() if name in report.turns}
    title = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in bases.items())
    out = Table(box=SIMPLE, title=title, collapse_padding=True, pad_edge=False)
    heads = ("method", "train\nloss", "validation\nloss", "accuracy", "ms a\nstep", "R")
    for head in (*heads, "Rf/Rb", "Tf/Tb"):
        out.add_column(head, no_wrap=True, justify="left" if head == "method" else "right")
    for row in report.rows():
        cells = [f"{x:.4f}" for x in (row.train_loss, row.validation_loss, row.accuracy)]
        cells += [f"{row.ms:.2f}", f"{row.r:.2f}"]
        cells += ["" if x is None else f"{x:.3f}" for x in (row.r_ratio, row.t_ratio)]
        out.add_row(row.method, *cells)
    stops = (f"{row.method} stopped. {row.stopped}" for row in report.rows() if row.stopped)
    out.caption = "\n".join(stops) or None
    return out


def main(args: Sequence[str] | None = None) -> None:
    """The console script: a user's mistake is one line on stderr and exit code 2.

    Args:
        args: of the command line; those of the process if None.
    """
    try:
        sys.exit(app(args, standalone_mode=False))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (FwdcompileError, ValueError, OSError, ImportError) as error:
        _fail(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("stopped", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own, for a wrong option
            raise
        _fail(error.format_message() or "see --help", 2)


def _fail(message: str, code: int) -> None:
    typer.echo(f"fwdcompile: {message}", err=True)
    sys.exit(code)


def _usual_tangents(target: Any) -> str:
    trained = isinstance(target, nn.Module) and any(p.requires_grad for p in target.parameters())
    return "parameters" if trained else "inputs"


def _device(text: str) -> torch.device:
    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device {text!r} cannot be used: {reason}") from error


def _lines(text: str) -> tuple[int, int | None]:
    first, colon, last = text.partition(":")
    if not colon or any(part and not part.isdecimal() for part in (first, last)):
        raise ValueError(f"--lines is a:b, as in 10:40, not {text!r}")
    return max(int(first or 1) - 1, 0), int(last) if last else None


def _example(text: str) -> Tensor:
    sizes, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    parts = sizes.split(",") if sizes else []
    if not isinstance(dtype, torch.dtype) or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--input is a shape, as 1,3,64,64 or 2,16:int64, not {text!r}")
    return torch.zeros([int(part) for part in parts], dtype=dtype)


def _import(path: str) -> Any:
    """The module or function at `module:name`; a factory that needs no argument is called."""
    module_name, _, name = path.partition(":")
    if not name:
        raise ValueError(f"{path!r} is not module:name, as in torchvision.models:resnet18")
    if module_name.split(".")[0] == "torchvision":
        import_torchvision()
    sys.path.insert(0, "")
    target: Any = importlib.import_module(module_name)
    for part in name.split("."):
        if not hasattr(target, part):
            raise ImportError(f"{module_name} has no {name!r}")
        target = getattr(target, part)
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise ValueError(f"{path} is a {type(target).__name__}, no module, factory or function")
    if required := _required(target):
        if inspect.isclass(target):
            raise ValueError(f"{path} needs {', '.join(required)}; name a factory that needs none")
        return target
    made = target()
    return made if isinstance(made, nn.Module) else target


def _required(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # torch's built-in functions, which all take arguments
        return ["input"]
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in several]
