"""What AdaLoRA keeps along this rank's spans once an engine has taken the parameters over: buffers, views, averages.

No decision is made here (``allocator.py``); every quantity is one of flat buffers (``sharding/layout.py``), so that the
number of operations does not depend on the number of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adalora_dist.config.methods import AdaptiveConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.digest import PatternDigest
from adalora_dist.methods.adalora.importance import Shares, Vectors, advance_averages, element_scores, shares_of
from adalora_dist.methods.adalora.sums import TripletSums
from adalora_dist.sharding.agreement import agreed, world_size
from adalora_dist.sharding.base import ShardEngine, spans_of_ranks
from adalora_dist.sharding.layout import FlatBuffer, SpanLayout
from adalora_dist.sharding.spans import Factor

MIN_PORTION, MAX_PORTIONS = 2**22, 64
"""Elements of a portion, 16 MiB, at least, so that small adapters have one; and how many portions there are at most."""
CACHED_PORTION = 2**17
"""Elements of a portion at most on a CPU: what a step reads and writes of them then stays in a core's cache."""


def portion_elements(num_elements: int, cached: bool = False) -> int:
    """Elements that a portion may have, of all that a rank holds; ``cached``: as on a CPU."""
    elements = max(MIN_PORTION, -(-num_elements // MAX_PORTIONS))
    return min(elements, CACHED_PORTION) if cached else elements


def state_bytes(num_elements: int, cached: bool = False) -> dict[str, int]:
    """Bytes that training P, Q and lambda takes on a rank that holds so many elements of them, by purpose.

    All is float32: ``parameters``, ``gradients``, the two ``moments`` of AdamW, the two averages of ``importance``
    until the pattern is frozen, and the ``portions`` that a step works in.
    """
    of_element = {"parameters": 4, "gradients": 4, "moments": 8, "importance": 8}
    portions = 8 * min(num_elements, portion_elements(num_elements, cached))
    return {purpose: size * num_elements for purpose, size in of_element.items()} | {"portions": portions}


class BoundTriplets:
    """The spans that this rank holds of all factors, laid out flat.

    What lasts are the two averages, 8 bytes for each element. A step works portion by portion, in the same memory one
    after the other, so that few elements (``portion_elements``) lie in memory twice:

    - ``values``: the elements w as the step begins, for the regulariser; then, in their place, w g, which the averages
      take in (with ``importance_order`` after, g until the weights have been stepped);
    - ``scratch``: the regulariser's gradient until it has been added; in an allocation the element scores.

    All is one portion where values have to last: from one firing of the optimizer to the next (ZeRO with sub-groups),
    or until the weights have been stepped.

    Args:
        factors: in canonical order.
        engine: over the same parameters; others, which the method trains besides, come after them.
        ranks: triplets of each matrix at the start of the run.
        measures: whether there are importance averages; they decide nothing once the pattern is frozen.
    """

    def __init__(
        self,
        factors: Sequence[Factor],
        engine: ShardEngine,
        ranks: Sequence[int],
        config: AdaptiveConfig,
        measures: bool,
    ) -> None:
        self.engine, self._config = engine, config
        self.spans = engine.spans()[: len(factors)]
        values = engine.values()
        device = values[0].device
        of_ranks = [spans[: len(factors)] for spans in spans_of_ranks(engine)]
        in_one = engine.num_firings > 1 or config.importance_order == "after"
        num_elements = sum(span.stop - span.start for span in self.spans)
        # A kernel passes over memory once, and is built anew for each length of a portion.
        cached = device.type == "cpu" and config.importance_kernel == "eager"
        self.layout = SpanLayout(factors, self.spans, None if in_one else portion_elements(num_elements, cached))
        self.sums = TripletSums(
            self.layout,
            of_ranks,
            device,
            num_matrices=2 * sum(rank > 0 for rank in ranks),
            num_replicas=world_size() // len(of_ranks),
        )
        self.skip = self.sums.partials[-1]  # 1 where this step has a non-finite gradient
        self.digest = PatternDigest(sum(ranks), device)
        longest = max(portion.stop - portion.start for portion in self.layout.portions)
        shapes, memory = [v.shape for v in values], torch.zeros(2, longest, dtype=torch.float32, device=device)
        self._values, self._scratch = (
            [FlatBuffer(self.layout, shapes, device, portion=portion, storage=part) for portion in self.layout.portions]
            for part in memory
        )
        num_scored = self.layout.num_elements if measures else 0
        self.sensitivity = torch.zeros(num_scored, dtype=torch.float32, device=device)
        self.uncertainty = torch.zeros(num_scored, dtype=torch.float32, device=device)
        self._vectors = []  # of each portion; averages are empty where there are none
        for (*_, start, stop), flat in zip(self.layout.portions, self._values, strict=True):
            averages = self.sensitivity[start:stop], self.uncertainty[start:stop]
            self._vectors.append(Vectors(*averages, flat.data, flat.data.view(torch.int32)))
        # The triplets of each P that this rank holds a part of, and lambda, if it holds a part of that.
        self.row_cuts = {k: f.rank for k, f in enumerate(factors) if f.kind == "P"}
        self.ps = [k for k in self.row_cuts if values[k].numel()]
        self.lams = [k for k, f in enumerate(factors) if f.kind == "lam" and values[k].numel()]
        self._masks: tuple[torch.Tensor, list[torch.Tensor]] | None = None  # a pattern, and its part per masked tensor
        self._are_scored = False  # the averages' scores have been added up
        if config.importance_kernel == "compiled" and measures:
            self._compile()

    # ---------------------------------------------------------------------------------------------- within a step

    def gram_partials(self) -> None:
        """Write this rank's part of the Gram matrices to ``sums.partials``."""
        held = self.engine.values()
        for values, scratch in zip(self._values, self._scratch, strict=True):
            self.layout.collect(held, values)
            self.sums.gram_partials(values, scratch)

    def collect_values(self) -> None:
        """Copy local elements to ``values``, as float32, if they are one portion: others wait for their turn."""
        if len(self._values) == 1:
            self.layout.collect(self.engine.values(), self._values[0])

    def regularise(self, keep: torch.Tensor | None) -> None:
        """Make the regulariser's gradient, for :meth:`take_in`, from the summed Gram matrices.

        ``keep``, (num_triplets,) bool: the regulariser is about these triplets alone; None: about all.
        """
        self.sums.make_factors(self._config.regulariser, self._config.orthogonality, keep)
        if len(self._values) == 1:
            self.sums.times_factors(self._values[0], self._scratch[0])

    def take_in(
        self,
        gradients: Sequence[torch.Tensor | None],
        regularised: bool,
        measures: bool,
        is_last: bool,
        scores: bool = False,
    ) -> None:
        """Of one firing: add the regulariser's gradient to those of P and Q, and advance the averages by w g.

        Args:
            gradients: local ones; None: of another firing.
            is_last: whether it is the step's last firing.
            scores: whether :meth:`score_partials` will be asked after the step: averages are scored as they are made.
        """
        held = self.engine.values() if len(self._values) > 1 else []
        advances = measures and is_last and self._config.importance_order != "after"
        shares = self._shares() if advances else None
        for values, scratch, vectors in zip(self._values, self._scratch, self._vectors, strict=True):
            if held:
                self.layout.collect(held, values)
                if regularised:
                    self.sums.times_factors(values, scratch)
            if regularised:
                local, flat = self.layout.views(gradients, scratch, orthogonal=True)
                if local:
                    torch._foreach_add_(local, flat)
            if not measures:
                continue
            if self._config.importance_order == "after":
                self.layout.collect(gradients, values)
                continue
            self._multiply(values, gradients)
            if shares is not None:
                self._update_averages(vectors, shares)
                if scores:
                    self._score(vectors, scratch)
        self._are_scored = scores and advances

    def take_in_stepped(self) -> None:
        """With ``importance_order`` after: advance the averages by w g, w as it is now."""
        [values], [vectors] = self._values, self._vectors
        self._multiply(values, self.engine.values())
        self._update_averages(vectors, self._shares())

    def _multiply(self, values: FlatBuffer, others: Sequence[torch.Tensor | None]) -> None:
        local, flat = self.layout.views(others, values)
        if local:
            torch._foreach_mul_(flat, local)

    def _shares(self) -> Shares:
        return shares_of(self._config.beta1, self._config.beta2, self.skip)

    def _update_averages(self, vectors: Vectors, shares: Shares) -> None:
        """Advance a portion's averages by w g, which stands in ``values``."""
        advance_averages(vectors, shares, self._config.importance_kernel == "compiled")

    def _score(self, vectors: Vectors, scratch: FlatBuffer) -> None:
        """Add up the scores of a portion's averages."""
        element_scores(self._config.importance, vectors.sensitivity, vectors.uncertainty, out=scratch.data)
        self.sums.add_up(scratch)

    def score_partials(self) -> torch.Tensor:
        """This rank's part of the triplet scores, float64, by the configured importance."""
        of_values = self._config.importance == "magnitude"
        if of_values:
            held = self.engine.values()
            for values, scratch in zip(self._values, self._scratch, strict=True):
                self.layout.collect(held, values)
                torch.abs(values.data, out=scratch.data)
                self.sums.add_up(scratch)
        elif not self._are_scored:
            for vectors, scratch in zip(self._vectors, self._scratch, strict=True):
                self._score(vectors, scratch)
        return self.sums.summed_scores("lam" if of_values else None)

    def mean_squares(self) -> torch.Tensor:
        """This rank's part of the mean squares of P's columns, lambda and Q's rows, (3, num_triplets) float64.

        Between two steps only: it takes both buffers.
        """
        held = self.engine.values()
        for values, scratch in zip(self._values, self._scratch, strict=True):
            self.layout.collect(held, values)
            torch.square(values.data, out=scratch.data)
            self.sums.add_up(scratch)
        return torch.stack([self.sums.summed_scores(kind) for kind in ("P", "lam", "Qt")])

    def mask(self, keep: torch.Tensor, frozen: bool) -> None:
        """lambda_i <- 0 for every triplet outside of ``keep`` (eq. 6). P, Q and the moments stay.

        Once the pattern is frozen, P_i <- 0 as well: then lambda_i has no gradient any more.
        """
        masked = self.lams + self.ps if frozen else self.lams
        values = [self.engine.values()[k] for k in masked]
        if self._masks is None or self._masks[0] is not keep:
            masks = [keep[slice(*self.spans[k])] for k in self.lams]
            if frozen:
                rows = dict(zip(self.row_cuts, keep.split(list(self.row_cuts.values())), strict=True))
                masks += [self._mask_of(k, rows[k], x) for k, x in zip(self.ps, values[len(masks) :], strict=True)]
            self._masks = keep, masks
        if masked:
            self.engine.write(masked, torch._foreach_mul(values, self._masks[1]))

    def _mask_of(self, k: int, row: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What to multiply ``values``, the local span of a P, by: its ``row`` of ones and zeros, once for each row."""
        if values.ndim == 2:
            return row
        span, rank = self.spans[k], len(row)
        length = span.stop - span.start
        return row.roll(-(span.start % rank)).repeat(-(-length // rank))[:length]

    def _compile(self) -> None:
        """Build the kernel of the importance averages, by a step that is left out. Collective.

        Raises:
            UserError: it cannot be built.
        """

        def attempt() -> None:
            self.skip.fill_(1)
            try:
                for vectors in self._vectors:
                    self._update_averages(vectors, self._shares())
            except Exception as error:  # whatever compiler it is that fails
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"importance_kernel=compiled: torch.compile cannot build it ({reason}): install a C++ compiler "
                    "(CPU) or Triton (GPU), or set importance_kernel to eager"
                ) from error

        agreed(attempt, keep=False)

    # ------------------------------------------------------------------------------------------ between two steps

    def averages(self) -> list[dict[str, torch.Tensor]]:
        """Per factor this rank's span of each average, a copy on the CPU; empty while there are none."""
        held: list[dict[str, torch.Tensor]] = [{} for _ in self.spans]
        for name, average in self._averages().items():
            flat = FlatBuffer(self.layout)
            flat.data.copy_(average)
            pieces = [torch.empty(span.stop - span.start) for span in self.spans]
            local, views = self.layout.views(pieces, flat)
            if local:
                torch._foreach_copy_(local, views)
            for of_factor, piece in zip(held, pieces, strict=True):
                of_factor[name] = piece
        return held

    def load_averages(self, held: Sequence[dict[str, torch.Tensor]]) -> None:
        """Set the averages from what :meth:`averages` gave, of this rank's spans now."""
        for name, average in self._averages().items():
            flat = FlatBuffer(self.layout)
            self.layout.collect([of_factor[name] for of_factor in held], flat)
            average.copy_(flat.data)

    def _averages(self) -> dict[str, torch.Tensor]:
        if self.sensitivity.numel() != self.layout.num_elements:
            return {}
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}
