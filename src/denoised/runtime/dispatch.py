"""Between the engine and `Turns`: pending calls as wishes, what ran as loads. Equal on every rank.

Chooses at the end of a tick for the next one, so that the client can be told what is coming.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from denoised.features.guidance import Guidance
from denoised.request import Service
from denoised.runtime.cost_model import CostModel, Kind, Load
from denoised.runtime.protocol import StepCost
from denoised.runtime.results import InFlight
from denoised.runtime.travels import Travels
from denoised.runtime.turns import Part, Turn, Turns, Wish
from denoised.steps import rows
from denoised.steps.forward import Call, Stage
from denoised.steps.rows import Piece

# How much of the older ticks is forgotten with each new one, in what ticks take beside their forwards.
NEWS = 0.05


class Dispatch:
    """Says whose calls run in this tick.

    Args:
        world_size: ranks of this engine; those at one place of the cfg axis are neighbours.
        join, max_rows, max_elements: as in `Turns`.
        travels: encoder and VAE calls that one rank runs for all.
        num_stages: of the pipeline.
    """

    def __init__(
        self,
        guidance: Guidance,
        *,
        world_size: int,
        join: bool,
        max_rows: int,
        num_stages: int = 1,
        max_elements: float = float("inf"),
        travels: Travels,
    ) -> None:
        self._guidance, self._world_size, self.travels = guidance, world_size, travels
        self._num_ranks = guidance.placement.num_ranks
        self.turns = Turns(
            num_ranks=self._num_ranks,
            join=join,
            max_rows=max_rows,
            max_elements=max_elements,
            costs=CostModel(num_stages),
        )
        self._wishes: dict[str, Wish] = {}
        self._whole, self._busy = 0.0, 0.0
        self.turn = Turn()
        self.num_waits = 0

    def enter(self, request_id: str, service: Service) -> None:
        self.turns.enter(request_id, service)

    def leave(self, request_id: str) -> None:
        self.turns.leave(request_id)
        self._wishes.pop(request_id, None)

    def choose(self, flights: Iterable[InFlight]) -> None:
        """Whose turn it is next. A request that waited asks for what it asked for before."""
        wishes = []
        for flight in flights:
            request_id = flight.task.task_id
            if request_id not in self._wishes:
                self._wishes[request_id] = self._wish(request_id, flight.task.pending)
            wishes.append(self._wishes[request_id])
        self.turn = self.turns.choose(wishes)
        self.num_waits += len(self.turn.wishes) < len(wishes)

    def _wish(self, request_id: str, calls: Sequence[Call]) -> Wish:
        parts = tuple(self._part(call) for call in calls)
        whole = [call for call in calls if not is_denoising(call)]
        everywhere = not all(self.travels.knows(call) for call in whole)
        return Wish(request_id=request_id, parts=parts, whole=bool(whole), everywhere=everywhere)

    def _part(self, call: Call) -> Part:
        if is_denoising(call):
            signature, size, homes = self._guidance.outlook(call)
            return Part(kind=(Stage.DENOISE, signature), size=size, homes=homes)
        size = rows.cost(call) * rows.batch_size(call)
        name = f"{call.target.name}.{call.target.method}"
        return Part(kind=(name, size), size=size, homes=(None,))

    def ran(self, calls: Sequence[Call], pieces: Sequence[tuple[int, Piece]], busy: Sequence[float]) -> None:
        """The turn is over: what each rank of the cfg axis ran, and the seconds that every rank was busy."""
        places = self._world_size // self._num_ranks
        slowest = [max(busy[place * places : (place + 1) * places]) for place in range(self._num_ranks)]
        self.turns.ran(self.turn, self._loads(calls, pieces), slowest)
        for wish in self.turn.wishes:
            self._wishes.pop(wish.request_id, None)

    def _parts(self, calls: Sequence[Call]) -> dict[Call, Part]:
        parts: dict[Call, Part] = {}
        for wish in self.turn.wishes:
            own = [call for call in calls if call.task_id == wish.request_id]
            parts |= dict(zip(own, wish.parts, strict=True))
        return parts

    def _loads(self, calls: Sequence[Call], pieces: Sequence[tuple[int, Piece]]) -> list[list[Load]]:
        parts = self._parts(calls)
        ranks: list[dict[tuple[Kind, str], Load]] = [{} for _ in range(self._num_ranks)]
        for call in calls:
            if not is_denoising(call):
                load = Load(kind=parts[call].kind, requests=1, rows=1, size=parts[call].size)
                for rank in self._ranks_of(call):
                    ranks[rank][load.kind, call.task_id] = load
        for rank, piece in pieces:
            part = parts[piece.call]
            key = (part.kind, piece.call.task_id)
            before = ranks[rank][key].rows if key in ranks[rank] else 0
            ranks[rank][key] = Load(kind=part.kind, requests=1, rows=before + len(piece.rows), size=part.size)
        return [self.turns.joined(list(own.items())) for own in ranks]

    def _ranks_of(self, call: Call) -> Iterable[int]:
        places = dict(self.turn.places)
        return (places[call.task_id],) if call.task_id in places else range(self._num_ranks)

    def prices(self, calls: Sequence[Call]) -> dict[Call, float]:
        """Predicted seconds of one row of each call of this turn."""
        prices = self.turns.prices(self.turn.wishes)
        return {call: prices[part.kind] for call, part in self._parts(calls).items()}

    def taken(self) -> list[float]:
        """Predicted seconds that each rank of the cfg axis spends in encoder and VAE calls in this turn."""
        whole = {part.kind for wish in self.turn.wishes if wish.whole for part in wish.parts}
        costs = self.turns.costs
        loads = self.turn.loads or ((),) * self._num_ranks
        return [sum(costs.seconds(load) for load in own if load.kind in whole) for own in loads]

    def measured(self, seconds: float, busy: float) -> None:
        """A whole tick took so long, of which the busiest rank worked `busy`. Of this rank alone: for `costs` only."""
        self._whole += seconds - NEWS * self._whole
        self._busy += busy - NEWS * self._busy

    def costs(self) -> dict[str, StepCost]:
        """Steps of the requests that are denoising."""
        extra = self._whole / self._busy if self._busy else 1.0
        told: dict[tuple[Part, ...], StepCost] = {}
        result = {}
        for request_id, wish in self._wishes.items():
            if not wish.whole:
                plain = tuple(Part(kind=p.kind, size=p.size, homes=(None,) * len(p.homes)) for p in wish.parts)
                if plain not in told:
                    told[plain] = self.turns.step_cost(Wish(request_id=request_id, parts=plain), extra)
                result[request_id] = told[plain]
        return result


def is_denoising(call: Call) -> bool:
    return call.target.stage is Stage.DENOISE
