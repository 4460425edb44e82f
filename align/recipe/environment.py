"""What a stage's completions take turns with: `environment:` of online and evaluate stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from align.recipe.strict import Finite, Fraction, Name, PositiveInt, Strict

CHOICE = "environment"  # the column by which a row chooses one of several
WRITTEN_AS = "hermes"  # how calls are asked for where the prompt describes tools
AROUND_ANSWER, AROUND_ANOTHER = 64, 16  # tokens that a template writes around an answer, and another of the turn
MAX_MEDIA = 4  # images in an episode where the recipe does not say


def _tools(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Environment(Strict):
    """A class of the user's, one object an episode (`use`), or plain functions as tools (`tools`).

    use: `file.py:Class` or `package.module:Class`; args: of its constructor; signature: `trl` for a class written for
    TRL's environment_factory. as: its name in metrics, objectives and rows. python: the interpreter that it runs in.

    max_turns: of the policy in an episode; max_tokens: that it may sample in one, where `rollout.max_tokens` bounds a
    turn; max_calls: of tools in a turn; max_observation_tokens: that the environment may add between two turns (several
    answers share them), images included, texts cut in the middle beyond; and before the first. max_media: images that
    it may show in an episode, beside those of the prompt; None: MAX_MEDIA where the model sees.
    timeout_s: seconds that a call of the environment may take. retries: how often an episode that was lost is drawn
    again; max_live: episodes at once of an engine; max_error_rate: of a step's episodes, the share that may be lost.

    on_error: what becomes of a tool that raises: the policy reads the error (`tell`), or the episode is lost (`fail`).
    on_timeout: likewise of one that takes too long (`tell`), or the episode is drawn again (`redraw`). on_kill: the
    score of an episode whose process died or had to be killed, however often it was drawn, in place of none; of several
    objectives a score for each, by name.

    history: what a turn is sampled behind: every token before it as it was sampled, thoughts included (`append`), or
    what the chat template writes of the conversation then (`template`). Where that is not what was sampled, the episode
    goes on in another sequence, whose beginning is not trained on again.

    tools_in: whether the chat template writes schemas, calls and answers, or they stand in the prompt as text. parser:
    how calls are read, where the template does not show it. lockstep: turns are sampled together, for runs that repeat
    bit for bit. memory_mb: data memory of an episode's process.
    """

    use: str | None = None
    tools: Annotated[tuple[str, ...], BeforeValidator(_tools)] = ()
    args: dict[str, Any] = Field(default_factory=dict)
    signature: Literal["align", "trl"] = "align"
    as_: Name | None = Field(default=None, alias="as")
    python: str | None = None
    max_turns: PositiveInt = 8
    max_tokens: PositiveInt = 2048
    max_calls: PositiveInt = 8
    max_observation_tokens: PositiveInt = 1024
    max_media: Annotated[int, Field(ge=0)] | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    retries: Annotated[int, Field(ge=0)] = 1
    max_live: PositiveInt = 64
    max_error_rate: Fraction = 0.02
    on_error: Literal["tell", "fail"] = "tell"
    on_timeout: Literal["tell", "redraw"] = "tell"
    on_kill: Finite | dict[str, Finite] | None = None
    history: Literal["append", "template"] = "append"
    tools_in: Literal["template", "prompt"] = "template"
    parser: str | None = None
    lockstep: bool = False
    memory_mb: Annotated[int, Field(ge=64)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Environment:
        if (self.use is None) == (not self.tools):
            raise ValueError("give `use: file.py:Class`, or `tools: [file.py:function, ...]`")
        if self.tools and self.args:
            raise ValueError("`args` are for the constructor of a class (`use`); functions have none")
        if self.tools and self.signature != "align":
            raise ValueError("`signature` says how a class is written (`use`); functions need none")
        if self.parser is not None and self.tools_in == "prompt" and self.parser != WRITTEN_AS:
            raise ValueError(
                f"`tools_in: prompt` asks for calls as {WRITTEN_AS} writes them, which `parser: {self.parser}` does "
                "not read; leave `parser` out"
            )
        return self

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.as_ or self.use or self.tools[0]

    @property
    def uses(self) -> tuple[str, ...]:
        """What it takes from files of Python."""
        return self.tools if self.use is None else (self.use,)

    def images(self, sees: bool) -> int:
        """How many it may show in an episode. sees: whether the model takes images."""
        return 0 if not sees else MAX_MEDIA if self.max_media is None else self.max_media

    def context_tokens(self, turn: int) -> int:
        """Tokens that an episode may add to its prompt: sampled ones (`turn`: at most in one turn), what `reset` adds,
        and what is said between any two turns."""
        sampled = min(self.max_tokens, self.max_turns * turn)
        return sampled + self.reset_tokens + (self.max_turns - 1) * self.answer_tokens

    def trained_tokens(self, turn: int) -> int:
        """Tokens that an episode may add to its prompt in all its sequences together: under `history: template` each
        turn may have one of its own."""
        if self.history == "append":
            return self.context_tokens(turn)
        sizes = (
            min(self.max_tokens, turns * turn) + self.reset_tokens + (turns - 1) * self.answer_tokens
            for turns in range(1, self.max_turns + 1)
        )
        return sum(sizes)

    @property
    def reset_tokens(self) -> int:
        """That `reset` may add to the prompt, with what the template writes around them."""
        return self.max_observation_tokens + AROUND_ANSWER

    @property
    def answer_tokens(self) -> int:
        """That may stand between two turns, with what the template writes around each of the answers."""
        return self.max_observation_tokens + AROUND_ANSWER + AROUND_ANOTHER * (self.max_calls - 1)


def _environments(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return [{"use": item} if isinstance(item, str) else item for item in items]


def _told_apart(several: tuple[Environment, ...]) -> tuple[Environment, ...]:
    """Of several environments each has a name, by which rows choose."""
    if len(several) < 2:
        return several
    names = [one.as_ for one in several]
    if None in names:
        unnamed = several[names.index(None)].name
        raise ValueError(
            f"of several environments each has a name by which rows choose it (their column `{CHOICE}`), and {unnamed} "
            "has none: write `as: NAME` beside it"
        )
    if twice := [name for n, name in enumerate(names) if name in names[:n]]:
        raise ValueError(f"two environments are called {twice[0]!r}: rename one (`as`)")
    if len({one.lockstep for one in several}) > 1:
        raise ValueError("an engine samples all episodes in lockstep or none: say the same `lockstep` in each")
    return several


EnvironmentField = Annotated[tuple[Environment, ...], BeforeValidator(_environments), AfterValidator(_told_apart)]
"""The environments of a stage, of which each row chooses one; () where completions are answers."""
