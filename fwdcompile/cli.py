"""The command line: `fwdcompile train`, `fwdcompile show`, `fwdcompile rules`."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from tqdm import tqdm

from . import rule
from .data import import_torchvision, load
from .errors import FwdcompileError
from .forward import transform
from .graph import draw
from .models import MODELS
from .runner import METHODS, Config, Report, Runner, plot

app = typer.Typer(
    help="Forward-mode automatic differentiation for PyTorch, by source transformation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help=f"one of {', '.join(MODELS)}")],
    data: Annotated[str, typer.Option(help="digits, mnist or fashion-mnist")] = "digits",
    data_root: Annotated[Path | None, typer.Option(help="directory of torchvision's sets")] = None,
    methods: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(METHODS)}")] = (
        "fgd,backprop,backprop-compiled"
    ),
    iterations: int = 1000,
    batch: int = 64,
    lr: float = 2e-4,
    decay: float = 1e-4,
    runs: int = 1,
    seed: int = 0,
    directions: Annotated[str, typer.Option(help="normal or rademacher")] = "normal",
    samples: Annotated[int, typer.Option(help="directions a step")] = 1,
    every: Annotated[int, typer.Option(help="steps between validations")] = 50,
    compile: bool = True,
    mode: Annotated[str, typer.Option(help="torch.compile's mode")] = "default",
    skip_nonfinite: Annotated[bool, typer.Option(help="leave such steps out")] = False,
    tensorboard: bool = False,
    out: Annotated[Path, typer.Option(help="directory for the log and the picture")] = Path("runs"),
    device: str = "cpu",
) -> None:
    """Trains methods side by side on a data set and prints the paper's measures."""
    if model not in MODELS:
        raise ValueError(f"no model is called {model!r}; there are {', '.join(MODELS)}")
    config = Config(
        methods=tuple(methods.split(",")),
        iterations=iterations,
        batch=batch,
        lr=lr,
        decay=decay,
        runs=runs,
        seed=seed,
        directions=directions,
        samples=samples,
        every=every,
        compile=compile,
        mode=mode,
        skip_nonfinite=skip_nonfinite,
    )
    dataset = load(data, data_root).to(device)
    shape, classes = dataset.train[0].shape[1:], dataset.classes
    total = config.iterations * config.runs * len(config.methods)
    with tqdm(total=total, unit="step") as bar:

        def progress(method: str) -> None:
            bar.set_description(method, refresh=False)
            bar.update()

        runner = Runner(
            lambda: MODELS[model](shape, classes),
            dataset,
            config,
            log=out,
            tensorboard=tensorboard,
            progress=progress,
        )
        report = runner.run()
    Console().print(table(report))
    plot(report, out / "loss.png", f"{model} on {data}")


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="module:name of a module, factory or function")],
    input: Annotated[
        list[str] | None, typer.Option(help="shape of an input, 1,3,64,64; once for each")
    ] = None,
    tangents: Annotated[
        str, typer.Option(help="parameters, inputs, or names with commas")
    ] = "parameters",
    lines: Annotated[str, typer.Option(help="a:b, which lines to print")] = ":",
    picture: Annotated[Path | None, typer.Option(help="draw the program to this file")] = None,
) -> None:
    """Prints the generated program of any importable model."""
    target = _import(model)
    shapes = [tuple(int(n) for n in text.split(",")) for text in input or ["1,3,64,64"]]
    forward = transform(target)
    names = tangents if tangents in ("parameters", "inputs") else tangents.split(",")
    lowered = forward.lower(*(torch.zeros(shape) for shape in shapes), tangents=names)
    first, _, last = lines.partition(":")
    chosen = lowered.code.splitlines()[int(first) - 1 if first else 0 : int(last) if last else None]
    text = "\n".join(chosen)
    if sys.stdout.isatty():
        Console().print(Syntax(text, "python", background_color="default"))
    else:
        typer.echo(text)
    if picture is not None:
        draw(lowered.graph(), picture)


@app.command(name="rules")
def list_rules(
    find: Annotated[str, typer.Argument(help="only ops whose name holds this")] = "",
) -> None:
    """Lists the rule table: op, word, arguments, where the row stands."""
    rows = sorted((str(op), row) for op, row in rule.table.items() if find in str(op))
    for name, row in rows:
        typer.echo(f"{name:55} {row.word:16} {', '.join(row.wrt)[:40]:42} {row.where}")
    typer.echo(f"{len(rows)} rows")


def table(report: Report) -> Table:
    """The report as a table for a terminal."""
    columns = ("method", "train loss", "validation loss", "accuracy", "ms a step", "R")
    out = Table(*columns, "Rf/Rb", "Tf/Tb", title=f"base runtime {_base(report)}")
    for row in report.rows():
        cells = [f"{row[k]:.4f}" for k in ("train_loss", "validation_loss", "accuracy")]
        cells += [f"{row['ms']:.2f}", f"{row['R']:.2f}"]
        cells += ["" if row[k] is None else f"{row[k]:.3f}" for k in ("R_ratio", "T_ratio")]
        out.add_row(row["method"], *cells)
        if row["stopped"]:
            out.add_row("", row["stopped"])
    return out


def main() -> None:
    """The console script: a user's mistake is one line on stderr and exit code 2."""
    try:
        app(standalone_mode=False)
    except (FwdcompileError, ValueError, OSError, ImportError) as error:
        typer.echo(f"fwdcompile: {error}", err=True)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "show"):
            error.show()
            sys.exit(2)
        raise


def _base(report: Report) -> str:
    return ", ".join(f"{kind} {seconds * 1e3:.2f} ms" for kind, seconds in report.base.items())


def _import(path: str) -> Any:
    module_name, _, name = path.partition(":")
    if not name:
        raise ValueError(f"{path!r} is not module:name, as in torchvision.models:resnet18")
    if module_name.split(".")[0] == "torchvision":
        import_torchvision()
    sys.path.insert(0, "")
    try:
        target = importlib.import_module(module_name)
        for part in name.split("."):
            target = getattr(target, part)
    except AttributeError as error:
        raise ImportError(f"{path}: {error}") from error
    if isinstance(target, torch.nn.Module) or not callable(target):
        return target
    required = [
        p for p in inspect.signature(target).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    made = target() if not required else target
    return made if isinstance(made, torch.nn.Module) else target
