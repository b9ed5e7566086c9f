"""`attribution …`: the command line. A verb imports what it needs when it is called, so that help is instant.

What a user can mend is printed as one sentence to stderr, with exit code 2; anything else is a bug and shows itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, Suppress

from attribution.errors import AttributionError, ConfigError
from attribution.verbs.flags import value_of

if TYPE_CHECKING:
    from attribution.runs import RunConfig

ROOT = "runs"
_QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error", "PYDANTIC_ERRORS_INCLUDE_URL": "0"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return 0
    if given[0] == "--version":
        print(f"attribution {metadata.version('attribution')}")
        return 0
    os.environ.update({**_QUIET, **os.environ})
    try:
        if given[0] not in VERBS:
            raise ConfigError(f"unknown command {given[0]!r}; expected {', '.join(VERBS)}")
        VERBS[given[0]](given[1:])
    except AttributionError as error:
        print(f"attribution: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:  # or SIGTERM
        print("attribution: interrupted; what was recorded is kept, and the same command goes on", file=sys.stderr)
        return getattr(error, "code", 130)
    except BrokenPipeError:  # `attribution ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _study(given: list[str]) -> None:
    """run a study: arms x models x seeds, and judge its claims; without a name, the embedded one"""

    from attribution.verbs.study import study

    study(given, ROOT, _tell)


def _run(given: list[str]) -> None:
    """one run on your model and samples: --model --recipe --data --probes, or a config.json to replay"""
    from attribution.runs import directory, run
    from attribution.runs.quiet import quiet

    said = f"the run's directory; by default below {ROOT}/, named by its config."
    config, further = _configured(given, "run", {"out": (str | None, None, said)})
    quiet()
    print(run(config, further["out"] or directory(config, ROOT), progress=_interactive(), tell=_tell))


def _forecast(given: list[str]) -> None:
    """before any training: which sets and components would a run's first step strengthen? Flags as of run"""
    further: dict[str, tuple[Any, Any, str]] = {
        "top": (int, 8, "how many single components are forecast too, those with the largest first-order causes."),
        "against": (str | None, None, "a recorded run: how well did the forecast rank what it did?"),
        "out": (str | None, None, "write forecast.json and tables into this directory; by default nothing is written."),
    }
    about = (
        "What the first step of a run would strengthen, and where its gain would sit. Nothing is trained. Of the settings of "
        "recording, kinds, layers and heads say of which components the top ones are taken; the others have no effect."
    )
    config, asked = _configured(given, "forecast", further, about)
    from attribution.reports.forecast import show
    from attribution.runs.forecast import against, forecast_of, write
    from attribution.runs.quiet import quiet
    from attribution.store import read_run

    run = read_run(asked["against"]) if asked["against"] else None
    quiet()
    found = forecast_of(config, top=asked["top"], progress=_interactive())
    compared = None if run is None else against(found, run)
    show(found, config, asked["against"], compared)
    if asked["out"]:
        print(write(found, config, asked["out"], compared))


def _discover(given: list[str]) -> None:
    """find a mechanism: attribution discover MODEL --cue A.jsonl --contrary B.jsonl --name N --out mechanisms.json"""

    def discover(
        model: Positional[str],
        /,
        cue: str,
        contrary: str,
        out: str,
        name: str = "mechanism",
        reference: str = "zero",
        metric: str = "logit_difference",
        resamples: int = 5,
        keep: float = 0.7,
        seed: int = 0,
    ) -> None:
        """Find the heads and neurons that bring about what a cue asks for, and write them as a named set.

        Args:
            model: an embedded model, a folder or a hub id.
            cue: JSONL file of prompts in which the cue stands, with the response it asks for.
            contrary: JSONL file of the same prompts without the cue or with a contrary one, line by line.
            out: JSON file of mechanisms to write, as --sets reads it; mechanisms of other names in it stay.
            name: of the mechanism.
            reference: what ablated activations become: zero; mean, over contrary prompts; resample, on the contrary prompt.
            metric: of what is kept and lost.
            resamples: draws of prompts on which it is sought.
            keep: share of the cue's effect that the set must keep alone, and that must go with it.
            seed: of the draws.
        """
        from attribution.errors import DataError
        from attribution.mechanisms import discover, read_mechanisms, write_mechanisms
        from attribution.models import load
        from attribution.runs.quiet import quiet
        from attribution.samples import ProbeSet

        quiet()
        known = read_mechanisms(out) if os.path.isfile(out) else {}
        probe = ProbeSet.read(cue, name=name, counterfactuals=contrary)
        found = discover(
            *load(model), probe, reference=reference, metric=metric, resamples=resamples, keep=keep, seed=seed,
            progress=_interactive(),
        )  # fmt: skip
        if not found.size:
            raise DataError(found.summary())
        print(found.summary())
        print(write_mechanisms(out, {**known, name: found.components}))

    tyro.cli(discover, args=given, prog="attribution discover")


def _doctor(given: list[str]) -> None:
    """before GPU hours: what a model has, what a study of it would cost, and what it will not measure"""

    from json import dumps

    from attribution.doctor import examine
    from attribution.doctor.plan import Asked
    from attribution.runs.quiet import quiet

    asked = tyro.cli(Asked, args=given, prog="attribution doctor")
    quiet()
    found = examine(
        asked.model, asked.plan, meta=asked.meta, dtype=asked.dtype, device=asked.device, memory=asked.memory,
        tflops=asked.tflops, bandwidth=asked.bandwidth, allow_pickle=asked.allow_pickle,
    )  # fmt: skip
    print(dumps(found.as_dict(), indent=2) if asked.json else found.page())


def _report(given: list[str]) -> None:
    """write the page and the summary of a run, finished or not, and print the page's path"""

    def report(run: Positional[str], /) -> None:
        """Write report.html and summary.md into a run directory, and print the path of the page.

        Args:
            run: a run directory; the run may be unfinished.
        """
        from attribution.reports import report

        print(report(run))

    tyro.cli(report, args=given, prog="attribution report")


def _diff(given: list[str]) -> None:
    """what one recipe strengthened more than another: attribution diff RUN RUN"""

    def diff(one: Positional[str], other: Positional[str], /, out: str | None = None) -> None:
        """Write the page and the summary of two recipes side by side, and print the path of the page.

        Args:
            one: a run, a directory of the runs of one arm, or STUDY:ARM for all models and seeds of an arm.
            other: the same; the page shows other minus one.
            out: the page; beside the runs of `other` if it is not given.
        """
        from attribution.reports import diff

        print(diff(one, other, out))

    tyro.cli(diff, args=given, prog="attribution diff")


def _ls(given: list[str]) -> None:
    """list studies and runs: verdicts, seeds done, recipe, model"""

    def ls(root: Positional[str] = ROOT, /, every: bool = False) -> None:
        """List the studies and runs below a directory: verdicts, and by arm the seeds that are done.

        Args:
            root: where to look.
            every: a line for every run instead of every arm.
        """
        from attribution.reports.listing import listing

        print(listing(root, every=every))

    tyro.cli(ls, args=given, prog="attribution ls")


def _samples(given: list[str]) -> None:
    """cut plain text into samples: attribution samples TEXT --out D.jsonl"""

    def samples(
        text: Positional[str], /, out: str, prompt_words: int = 24, response_words: int = 8, limit: int | None = None
    ) -> None:
        """Cut a text file into (prompt, response) samples of consecutive words, within paragraphs, without overlap.

        Args:
            text: a file of plain text, paragraphs apart by blank lines.
            out: JSONL file to write.
            prompt_words: words of each prompt.
            response_words: words of each response.
            limit: at most this many samples, spread evenly over the text.
        """
        from attribution.errors import DataError
        from attribution.samples import samples_from_text, write_samples
        from attribution.texts import text as text_of

        try:
            given = text_of(text)
        except OSError as error:
            raise DataError(f"cannot read {text}: {error.strerror}; name a text file") from None
        found = samples_from_text(given, prompt_words=prompt_words, response_words=response_words, limit=limit)
        print(f"{len(found)} samples in {write_samples(out, found)}")

    tyro.cli(samples, args=given, prog="attribution samples")


def _recipes(given: list[str]) -> None:
    """list the recipes that --recipe knows"""

    def recipes() -> None:
        """List the recipes that `attribution run --recipe` knows; path/to/file.py:Name works too."""
        from attribution.recipes import names

        for name, place in sorted(names().items()):
            print(f"{name}  {place}")

    tyro.cli(recipes, args=given, prog="attribution recipes")


def _new_recipe(given: list[str]) -> None:
    """write a recipe to start from, and its test: attribution new-recipe my_recipe"""

    def new_recipe(name: Positional[str], /, folder: str = ".") -> None:
        """Write a commented recipe, which works as it is, and its test.

        Args:
            name: of the recipe, as my_recipe or MyRecipe.
            folder: where the two files go.
        """
        from attribution.recipes.new import write_recipe

        file, test = write_recipe(name, folder)
        title = next(line.split()[1].partition("(")[0] for line in file.read_text().splitlines() if line.startswith("class "))
        print(f"{file}  the recipe; train with it: attribution run --recipe {file}:{title} --model … --data … --probes …")
        print(f"{test}  its test: pytest {test}")

    tyro.cli(new_recipe, args=given, prog="attribution new-recipe")


def _chat(given: list[str]) -> None:
    """render samples with a model's chat template: attribution chat D.jsonl --model M --out F.jsonl"""

    def chat(data: Positional[str], /, model: str, out: str) -> None:
        """Write samples as the chat template of a model renders them, or as they are where it has none.

        Args:
            data: JSONL of samples.
            model: whose tokenizer alone is loaded.
            out: JSONL file to write.
        """
        from attribution.chat import write_in_chat
        from attribution.models import load_tokenizer

        print(write_in_chat(data, load_tokenizer(model), out))

    tyro.cli(chat, args=given, prog="attribution chat")


def _claims(given: list[str]) -> None:
    """the ledger of claims, as declared; with a study, their verdicts"""

    def claims(claim: Positional[str] = "", /, study: str = "") -> None:
        """Print the ledger: every claim with its smallest effect of interest and the hash of its declaration.

        Args:
            claim: id of one, which is printed as it was declared.
            study: directory of a study; with its verdicts.
        """
        from attribution.reports.ledger import ledger

        print(ledger(claim, study))

    tyro.cli(claims, args=given, prog="attribution claims")


def _build_world(given: list[str]) -> None:
    """train an embedded model anew: attribution build-world kindland --seed 51"""

    def build_world(world: Positional[str], /, seed: int, out: str = "", early: tuple[int, ...] = ()) -> None:
        """Train an embedded model from its world's documents: the same bytes for the same seed on the same machine.

        Args:
            world: planted, planted/unrouted or kindland.
            seed: of the documents and of the initial weights.
            out: folder to write; WORLD-SEED if it is not given.
            early: steps after which the model is written too, each to the folder OUT-STEP.
        """
        from attribution.worlds.build import build

        print(build(world, seed, out or f"{world.replace('/', '-')}-{seed}", progress=_interactive(), early=early))

    tyro.cli(build_world, args=given, prog="attribution build-world")


VERBS: dict[str, Callable[[list[str]], None]] = {
    "study": _study,
    "run": _run,
    "forecast": _forecast,
    "discover": _discover,
    "doctor": _doctor,
    "report": _report,
    "diff": _diff,
    "ls": _ls,
    "recipes": _recipes,
    "new-recipe": _new_recipe,
    "claims": _claims,
    "samples": _samples,
    "chat": _chat,
    "build-world": _build_world,
}


def _help() -> str:
    lines = [f"  {name:<12} {verb.__doc__}" for name, verb in VERBS.items()]
    return "\n".join([
        "Which circuits of a language model does finetuning strengthen?", "",
        "usage: attribution COMMAND …       `attribution COMMAND --help` explains one", "", *lines,
    ])  # fmt: skip


def _configured(
    given: list[str], verb: str, further: Mapping[str, tuple[Any, Any, str]], about: str = ""
) -> tuple[RunConfig, dict[str, Any]]:
    """A run's config from flags, from a config.json that stands before them, or from both; and the values of further flags.

    Args:
        given: the command line after the verb.
        verb: who asks.
        further: type, default and explanation of the verb's own flags, by name.
        about: what the verb does; by default what a run does.
    """
    from pydantic import Field, ValidationError, create_model

    from attribution.recipes import recipe_named
    from attribution.runs import RunConfig, first_error

    replayed = RunConfig.read(given.pop(0)) if given and given[0].endswith(".json") else None
    name = value_of(given, "--recipe") or (replayed.recipe if replayed else "sft")
    recipe = recipe_named(name)
    own: dict[str, Any] = {name: (kind, Field(default=default)) for name, (kind, default, _) in further.items()}
    parsed = create_model(
        "RunConfig",
        __base__=RunConfig,
        training=(recipe, Field(default_factory=recipe)),
        inputs=(Annotated[dict[str, str], Suppress], {}),
        **own,
    )
    run, heading, attributes = (RunConfig.__doc__ or "").partition("    Attributes:")
    said = "".join(f"        {name}: {explained}\n" for name, (_, _, explained) in further.items())
    parsed.__doc__ = f"{about or run.rstrip()}\n\n{heading}{attributes.rstrip()}\n{said}"
    try:
        default = tyro.MISSING_NONPROP if replayed is None else parsed.model_validate(replayed.model_dump())
        config = tyro.cli(parsed, args=given, prog=f"attribution {verb}", default=default)
        fields = {field: getattr(config, field) for field in RunConfig.model_fields}
        return RunConfig.model_validate(fields), {name: getattr(config, name) for name in further}
    except ValidationError as error:
        raise ConfigError(first_error(error, RunConfig)) from None


def _interactive() -> bool:
    return sys.stderr.isatty()


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
