"""``pysparse ebf``: sparsity by hyperpriors on images."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pysparse.cli.options import Debug, Json, Seed, Threads
from pysparse.cli.output import emit, guarded, say

if TYPE_CHECKING:
    from pysparse.bayes.deblur import Restored

app = typer.Typer(
    help="Sparsity by hyperpriors (empirical Bayes), after Li, Dong, Zeng 2025.", no_args_is_help=True
)


class Axis(StrEnum):
    """What a sweep changes."""

    noise = "noise"
    psf = "psf"


SWEEPS = {"noise": (0.001, 0.003, 0.01, 0.03, 0.05), "psf": (1.0, 1.5, 2.0, 3.0)}


@app.callback()
def main() -> None:
    """Sparsity by hyperpriors (empirical Bayes), after Li, Dong, Zeng 2025."""


@app.command()
def deblur(
    image: Annotated[
        str,
        typer.Argument(help="An image of scikit-image's wheel: camera, coins, text, ...", show_default=False),
    ],
    psf: Annotated[
        str, typer.Option(help="gaussian:SD, disk:RADIUS or motion:LENGTH, in pixels.")
    ] = "gaussian:1.5",
    noise: Annotated[float, typer.Option(help="Noise, as a fraction of the blurred image's norm.")] = 0.01,
    hyperprior: Annotated[
        list[str] | None,
        typer.Option(
            help="flat, half-laplace, half-root, half-two-thirds, half-gaussian, jeffreys; may be repeated. "
            "[default: flat and half-laplace]"
        ),
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Also l1 (oracle), TV (oracle), Tikhonov (oracle), IAS.")
    ] = True,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 128,
    transform: Annotated[str, typer.Option(help="What is sparse: haar, db2, ... or pixels.")] = "haar",
    boundary: Annotated[str, typer.Option(help="periodic (FFT) or reflective (DCT).")] = "periodic",
    kappa: Annotated[float, typer.Option(help="Strength of the increasing hyperpriors.")] = 1.0,
    iterations: Annotated[int, typer.Option(min=1, help="Of the fixed point.")] = 25,
    probes: Annotated[int, typer.Option(min=1, help="Random draws for the diagonal.")] = 8,
    sweep: Annotated[
        list[Axis] | None, typer.Option(help="Also sweep over noise or psf (ill-posedness); may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Noise draws of a sweep.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for pictures and results.json.")] = None,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Blur a bundled image, restore it by every hyperprior and baseline, and compare."""
    with guarded(debug):
        from pysparse.calib.extras import require

        require("bayes", "scipy", "skimage", "pywt", *(() if out is None else ("matplotlib",)))
        from pysparse.bayes import deblur as experiments
        from pysparse.bayes.matrix_free import OperatorSettings

        settings = OperatorSettings(iterations=iterations, probes=probes, seed=seed)
        setup = experiments.Setup(
            psf, noise, size, transform, boundary=boundary, kappa=kappa, seed=seed, workers=threads,  # type: ignore[arg-type]
            settings=settings,
        )  # fmt: skip
        methods = [*(hyperprior or ("flat", "half-laplace")), *(experiments.BASELINES if baselines else ())]
        truth = experiments.bundled_image(image, size)
        experiment, found = experiments.compare(truth, setup, methods, lambda name: say(f"{name} ..."))
        content: dict[str, Any] = {
            "image": image, "psf": psf, "noise": noise, "size": size, "transform": transform,
            "condition": experiment.condition, "methods": [one.record() for one in found],
        }  # fmt: skip
        for axis in dict.fromkeys(sweep or ()):
            say(f"sweep over {axis.value} ...")
            content.setdefault("sweeps", {})[axis.value] = list(
                experiments.sweep(truth, setup, methods, axis.value, SWEEPS[axis.value], seeds)
            )
        emit(_table(f"{image}, {size} px, {psf}, noise {noise:g}", found), json, content)
        if out is not None:
            _write(out, experiment, found, content)


def _table(title: str, found: list[Restored]) -> Any:
    from pysparse.measure.results import make_table

    columns = ["method", "relative error", "PSNR", "SSIM", "non-zeros", "oracle weight", "seconds"]
    lines = [
        [
            one.method, f"{one.relative_error:.4f}", f"{one.psnr:.2f}", f"{one.ssim:.3f}", one.nonzeros,
            None if one.setting is None else f"{one.setting:.3g}", f"{one.seconds:.1f}",
        ]
        for one in found
    ]  # fmt: skip
    return make_table(title, columns, lines)


def _write(folder: Path, experiment: Any, found: list[Restored], content: dict[str, Any]) -> None:
    from pysparse.bayes.figures import draw_convergence, draw_images, draw_sweep
    from pysparse.measure.results import write_json

    folder.mkdir(parents=True, exist_ok=True)
    files = [
        draw_images(experiment, found, folder / "images.png"),
        draw_convergence(found, folder / "convergence.png"),
    ]
    files += [
        draw_sweep(rows, folder / f"sweep_{axis}.png") for axis, rows in content.get("sweeps", {}).items()
    ]
    files.append(Path(write_json(folder / "results.json", content)))
    say(f"wrote {', '.join(str(path) for path in files)}")
