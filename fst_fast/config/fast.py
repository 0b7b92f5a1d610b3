"""The section `fast` of the configuration: how contexts evolve (see schema.py for all the others)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fst_fast.config import checks
from fst_fast.config.components import NAME, NAMES, compose, names_one
from fst_fast.config.section import Section

ComponentName = Annotated[str, Field(pattern=f"^{NAME}$", description=NAMES)]
TemplateName = Annotated[
    str, Field(pattern=f"^(?:context|tool|skill|{NAME})$", description=f"context, tool, skill, {NAMES}")
]


class FastBudget(Section):
    """What the evolution of the contexts may use over the whole run. A budget that is used up ends it, before the next wave at the latest: the
    contexts stay as they are, the slow phase goes on; with method=gepa the run ends. null: no limit."""

    tokens: int | None = Field(None, ge=1)
    """Tokens that the policy samples in fast phases and that the reflector reads and writes, as it reports them."""
    seconds: float | None = Field(None, gt=0)
    """Time in fast phases. A run that is ended by it does not repeat itself."""
    usd: float | None = Field(None, gt=0)
    """Cost of the reflections: with reflector=openai by the prices in reflector_args, with a function of yours what its replies say."""
    idle_cycles: int | None = Field(None, ge=1)
    """Fast phases in a row that admit no child; a new stage counts anew."""


class FastConfig(Section):
    """The fast phase: evolution of the contexts by reflection."""

    population: int = Field(4, ge=1)
    """Contexts kept after a fast phase (K). slow.group_size must be a multiple of it."""
    cycle_steps: int = Field(6, ge=1)
    """Slow steps between two fast phases (T)."""
    anchor_size: int = Field(32, ge=1)
    """Problems on which contexts are compared, drawn from the next cycle_steps minibatches."""
    rollout_budget: int = Field(960, ge=0)
    """Maximum number of rollouts of one fast phase, over all processes."""
    phases: Literal["alternate", "first", "first_and_last"] = "alternate"
    """When the contexts evolve, with method=fst: `alternate`, before every cycle_steps slow steps; `first`, once before the first step of the
    run or stage, then they are frozen; `first_and_last`, once more after its last step."""
    evolver: Literal["waves", "gepa", "e_spl"] = "waves"
    """How they evolve: `waves`, this package's (docs/fast_phase.md); `gepa`, GEPA's own loop, one candidate at a time; `e_spl`, by ratings that
    the slow phase's rollouts give (E-SPL), after every slow step, without rollouts of its own; the other keys of budget, waves and anchor set
    then have no effect."""
    generations: int = Field(3, ge=1)
    """Generations of proposals in a fast phase, if the budget pays for them."""
    first_generations: int = Field(12, ge=1)
    """Generations of the first fast phase."""
    search_budget: int | None = Field(None, ge=0)
    """Most rollouts of a fast phase that starts with the seed context alone, as long as it finds nothing: no context that is better by three standard
    errors, or with parents=front and improvement none that is admitted. It then runs as many waves as they pay for. null: rollout_budget and
    generations hold as they do later. It belongs to evolver=waves."""
    children: int = Field(16, ge=1)
    """Contexts compared with their parents in one generation."""
    proposals: int | None = Field(None, ge=1)
    """Reflections asked for in one generation, as one batch; null: as many as children. Where more than `children` of them are usable, each is first
    scored with one rollout on each of fast.screen_problems anchor problems, and the best go on."""
    screen_problems: int = Field(4, ge=1)
    """Anchor problems of that first comparison."""
    rungs: int = Field(1, ge=1, le=8)
    """Race the children of a wave by sequential halving: they start on the first of 2^(rungs - 1) parts of the anchor problems; after each rung
    those that are not ahead of their parent are out, and the better half of the children goes on to twice as many problems. 1: all are scored in full."""
    samples: int = Field(2, ge=1)
    """Rollouts of a context on each anchor problem."""
    failures_shown: int = Field(3, ge=1)
    """Failed rollouts shown to the reflector in one reflection."""
    admit_z: float = Field(1.0, ge=0)
    """A child is admitted if its mean reward exceeds its parent's by more than this many standard errors of the paired difference."""
    parents: Literal["thompson", "front", "improvement"] = "thompson"
    """Which contexts children come from, and how children are scored. `thompson`: of all contexts of the phase the one whose mean reward, drawn from
    what its rollouts say of it, is the highest; a child starts with two rollouts, and in every wave the most promising go on to twice as many,
    until they are scored in full. `front`: in proportion to the problems that they win; all children of a wave are scored in full. `improvement`:
    in proportion to how much a child of theirs is expected to exceed the best mean, and scored as with `front`."""
    crossover: float = Field(0.0, ge=0, le=1)
    """How often a reflection also shows another context, the one that wins the most problems that the parent does not win, to take over what
    serves them. With evolver=e_spl: how often there is a recombination, besides the mutation; E-SPL's own value is 0.2."""
    keep_seed: bool = False
    """Keep the seed context in the population however low its score, so that it keeps its share of every group."""
    max_context_tokens: int = Field(64, ge=1)
    """Longest context; a longer proposal is refused."""
    seed_context: str = "solve the problem ."
    """Text that the evolution starts from; with method=rl the only context."""
    components: dict[ComponentName, str] = Field(default_factory=dict)
    """Contexts of named parts, by name the texts that the evolution starts from, instead of seed_context: `system`, `protocol`, `examples`,
    `skill:NAME` and `tool:NAME`, the description of a tool. max_context_tokens holds for each of them."""
    component_selector: Literal["round_robin", "worst_first", "all"] = "round_robin"
    """With components: which of them a child revises. `round_robin`: the next one in turn; `worst_first`: the one with the lowest reward of those
    that were revised in vain the fewest times (docs/environments.md); `all`: each of them, one reflection for each."""
    merge: bool = False
    """With components: one child of a generation takes its components from two contexts that win different problems, without a reflection."""
    budget: FastBudget = FastBudget()
    reflector: str = "mini"
    """`mini` (rules, mini world only), `self` (the frozen base model), `openai` (any compatible endpoint), `given` (contexts
    written by hand, one after the other), or `file.py:NAME`, a function or class."""
    reflector_args: dict[str, Any] = Field(default_factory=dict)
    """For reflector=openai: base_url, model, timeout_s, retries, concurrency, max_tokens, temperature, prices. The API key comes from OPENAI_API_KEY
    only. For reflector=given: contexts, the texts. For a class of yours its keyword arguments."""
    reflection_templates: dict[TemplateName, str] = Field(default_factory=dict)
    """Files with requests of your own to the reflector, by the component that they are for: its name, `tool` or `skill` for all of a kind, `context`
    for all others and for contexts of one text. With the placeholders {context} and {failures}, and if wanted {component} and {whole}."""
    reflection_tokens: int = Field(1024, ge=1)
    """For reflector=self: longest reply, in tokens; a reply that is cut there is refused."""
    reflection_style: Literal["auto", "full", "short"] = "auto"
    """For reflector=self: `full` shows whole failures and asks for an analysis; `short` asks for one small edit, shown by examples, and
    begins the reply, as small models need it. `auto`: short for a base model of fewer than 3e9 parameters."""
    adaptive: bool = False
    """Skip fast phases that are unlikely to help: after one that admits no child, the contexts are carried over unscored for one cycle, after
    two in a row for two cycles, then for three. An admitted child or a new stage ends it. While the seed context is the only one, it takes one
    more such phase."""
    reuse_rollouts: bool = True
    """Use the rollouts of a cycle's fast phase in its RL groups before sampling new ones, each once; the importance ratio uses their stored
    log-probs."""

    @model_validator(mode="before")
    @classmethod
    def _components_are_the_seed(cls, given: Any) -> Any:
        """Contexts are composed texts; so is the first one."""
        parts = given.get("components") if isinstance(given, dict) else None
        if not isinstance(parts, dict) or not parts or not all(isinstance(v, str) for v in parts.values()):
            return given
        if named := [name for name, text in parts.items() if names_one(text)]:
            raise ValueError(
                f"fast.components.{named[0]} holds a line that names a component, such as <<system>>"
            )
        seed = compose(parts)
        if given.get("seed_context", seed) != seed:
            raise ValueError(
                "fast.components and fast.seed_context are both given; the components are the seed context"
            )
        return {**given, "seed_context": seed}

    @model_validator(mode="after")
    def _fits(self) -> FastConfig:
        checks.fast(self)
        return self
