"""What the user says -> answers of one or two models, shown as they grow: in columns, or under each other."""

import sys

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from konic.cli.generate import shown_rewards
from konic.cli.typewriter import Typewriter
from konic.finetuning import ConfigError, KonicLLMRewardComposer
from konic.finetuning.data.prompts import Prompt
from konic.finetuning.data.samples import Sample
from konic.finetuning.errors import KonicError, is_valid_text
from konic.output import is_terminal, write_line
from konic.saved.agents import BASE, SavedRun, recorded
from konic.saved.chat import next_prompt, with_room_for_chat
from konic.saved.evaluation import score_responses
from konic.saved.weights import Weights
from konic.text import printable_lines

COLUMNS_FROM = 90
"""Width of the terminal from which two answers stand side by side."""


class Conversation:
    """A chat with weights of a run and, beside them, with its base: each has its own answers as its history."""

    def __init__(
        self,
        saved: SavedRun,
        name: str,
        shows_base: bool,
        composer: KonicLLMRewardComposer | None,
        device: str,
        system: str | None,
    ) -> None:
        self._saved, self._composer, self._device, self._seed = saved, composer, device, saved.seed
        settings = recorded(saved.run, "dataset_config")
        given, kwargs = settings.get("system_prompt"), settings.get("chat_template_kwargs")
        self._system = system if system is not None else given if isinstance(given, str) else None
        self._kwargs = kwargs if isinstance(kwargs, dict) else {}
        self._tuned = self._loaded(name)
        self._base: Weights | None = None
        self._turns: dict[str, list[tuple[str, str]]] = {"base": [], "tuned": []}
        self._shows_base = False
        if shows_base and name != BASE:
            self.toggle_base("")
        if not self._tuned.policy.tokenizer.chat_template:
            write_line("The model has no chat template: it continues what you write as plain text.", sys.stdout)

    def _loaded(self, name: str) -> Weights:
        write_line(f"Loading {name} ...", sys.stderr)
        return with_room_for_chat(Weights.load(name, self._saved.agent(name), self._device))

    def reset(self, _: str) -> str:
        """Forget the chat."""
        self._turns = {"base": [], "tuned": []}
        return "The chat starts again."

    def toggle_base(self, _: str) -> str:
        """Show the base, or hide it. One that appears later takes the answers of the other model as its own."""
        self._shows_base = not self._shows_base
        if not self._shows_base:
            return "The base is hidden."
        self._base = self._base or self._loaded(BASE)
        self._turns["base"] = [*self._turns["tuned"]]
        return "The base answers too, after the same chat."

    def load(self, value: str) -> str:
        """Talk to other weights from here on."""
        if not value:
            return f"This is {self._tuned.name}. Other weights: /weights NAME."
        self._tuned = self._loaded(self._saved.name_of(value))
        return f"{value} goes on with this chat."

    def set_system(self, value: str) -> str:
        """Set the system message."""
        if not self._tuned.policy.tokenizer.chat_template:
            return "The model has no chat template, and so no system message."
        self._system = value or None
        return "The system message is set." if value else "There is no system message."

    def set_seed(self, value: str) -> str:
        """Take other random numbers."""
        if value and not (value.isascii() and value.isdigit() and len(value) < 19):
            return f"/seed {value}: give a whole number of at least 0."
        self._seed = int(value) if value else self._seed
        return f"The seed is {self._seed}."

    def answer(self, text: str) -> None:
        """Let each model answer, and show the answers as they grow. Ctrl-C ends one answer."""
        if not is_valid_text(text):
            raise ConfigError("That is not text in UTF-8.")
        sides = {"tuned": self._tuned}
        if self._shows_base and self._base is not None and self._tuned.name != BASE:
            sides = {"base": self._base} | sides
        prompts = {}
        for side, weights in sides.items():
            prompts[side], cut = next_prompt(weights, self._turns[side], text, self._system, self._kwargs)
            if cut:
                write_line(cut, sys.stdout)
        with _page([weights.name for weights in sides.values()]) as page:
            for side, weights in sides.items():
                said, sample = _listen(weights, prompts[side], self._seed, page)
                self._turns[side].append((text, said))
                if weights.name == BASE and side == "tuned":  # it is both sides
                    self._turns["base"].append((text, said))
                page.end(weights.name, said, self._rewards(sample))

    def _rewards(self, sample: Sample | None) -> str:
        """Return a line with the rewards of a whole answer; what is wrong with them does not end the chat."""
        if self._composer is None or sample is None:
            return ""
        try:
            return shown_rewards(score_responses(self._composer, [sample], self._saved.scoring)[0]).strip()
        except KonicError as error:
            return f"Error: {error}"


def _listen(weights: Weights, prompt: Prompt, seed: int, page: "_Lines | _Columns") -> tuple[str, Sample | None]:
    """Return the text of an answer, and the answer unless Ctrl-C ended it."""
    said = ""

    def show(text: str) -> None:
        nonlocal said
        said = text
        page.show(weights.name, text)

    try:
        sample = weights.stream(prompt, seed, show)
    except KeyboardInterrupt:
        return said, None
    return sample.response, sample


def _page(names: list[str]) -> "_Lines | _Columns":
    width = Console().width
    return _Columns(names) if len(names) > 1 and is_terminal(sys.stdout) and width >= COLUMNS_FROM else _Lines()


class _Lines:
    """Answers under each other."""

    def __init__(self) -> None:
        self._writer: Typewriter | None = None

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, name: str, text: str) -> None:
        """Show an answer so far."""
        if self._writer is None:
            write_line(f"{name}: ", sys.stdout, end="")
            self._writer = Typewriter(sys.stdout)
        self._writer(text)

    def end(self, name: str, text: str, rewards: str) -> None:
        """Show a whole answer and its rewards."""
        self.show(name, text)
        assert self._writer is not None  # noqa: S101
        self._writer.end(text)
        self._writer = None
        if rewards:
            write_line(f"  {rewards}", sys.stdout)


class _Columns:
    """Answers side by side."""

    def __init__(self, names: list[str]) -> None:
        self._texts = dict.fromkeys(names, "")
        self._rewards = dict.fromkeys(names, "")
        self._console = Console(highlight=False)
        self._live = Live(self._table(), console=self._console, refresh_per_second=12)

    def __enter__(self) -> "_Columns":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _table(self) -> Table:
        width = self._console.width - 3  # room for the ^C that a terminal shows, which must not begin a line
        table = Table(box=None, width=width, padding=(0, 2, 0, 0))
        for name in self._texts:
            table.add_column(Text(name), ratio=1, overflow="fold")
        table.add_row(*(Text(printable_lines(text.strip())) for text in self._texts.values()))
        if any(self._rewards.values()):
            table.add_row(*(Text(printable_lines(line), style="dim") for line in self._rewards.values()))
        return table

    def show(self, name: str, text: str) -> None:
        """Show an answer so far."""
        self._texts[name] = text
        self._live.update(self._table())

    def end(self, name: str, text: str, rewards: str) -> None:
        """Show a whole answer and its rewards."""
        self._rewards[name] = rewards
        self.show(name, text)
