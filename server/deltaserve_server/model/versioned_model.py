"""A model's state but its vectors, and the ways in which a version comes about."""

from collections.abc import Sequence

from deltaserve._common.optimizers import Optimizer, Slot
from deltaserve_server.model.decision import Answer, BumpVersion, Refuse, Update
from deltaserve_server.model.layout import Layout
from deltaserve_server.model.push import Key, PushResult, UpdateSummary
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.round import PendingPush, Round
from deltaserve_server.model.sessions import Sessions


class VersionedModel:
    """The state that all policies share, and the steps that they make with it.

    A version numbers the weights that workers see. It rises with every update, with every replacement of the whole
    state, and with a version bump: the same weights under the next number.

    Attributes:
        name: The model's name.
        layout: Its tensors.
        groups: Its optimizer by parameter group; all have the same structure.
        version: The version of its weights; 0 for those that it was created with.
        update_counts: By tensor: how many updates its optimizer state has had.
        sessions: Its workers.
        round: The open round of the synchronous policy.
        withheld: Answers that the bounded policy keeps back from workers that are too far ahead.
    """

    def __init__(self, name: str, layout: Layout, groups: Sequence[Optimizer]) -> None:
        self.name = name
        self.layout = layout
        self.groups = tuple(groups)
        self.version = 0
        self.update_counts: tuple[int, ...] = (0,) * len(layout.tensors)
        self.sessions = Sessions()
        self.round = Round(opened=0)
        self.withheld: dict[Key, Answer] = {}

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The vectors of optimizer state."""
        return self.groups[0].slots

    def hyperparameters(self, carried: tuple[Optimizer, ...] | None) -> tuple[Optimizer, ...]:
        """Returns what an update uses, by group: what its pushes carry, and the model's own for the other groups."""
        carried = carried or ()
        return (*carried, *self.groups[len(carried) :])

    def update(
        self, pushes: Sequence[PendingPush], hyperparameters: tuple[Optimizer, ...], now: float
    ) -> tuple[Update, list[Answer]]:
        """Makes the next version of pushes, which are in the order of worker names, and returns their answers too."""
        # A tensor without any gradient is left alone: a gradient of zeros would let its optimizer state decay.
        absent = frozenset.intersection(*(pending.absent(len(self.layout.tensors)) for pending in pushes))
        contributions = tuple(pending.contribution(self.version) for pending in pushes)
        self.count_update(self.version + 1, absent)
        summary = UpdateSummary(version=self.version, contributions=contributions, hyperparameters=hyperparameters)
        weight = sum(contribution.weight for contribution in contributions)
        # With these a replay finds the sessions, and still tells a duplicate from other values.
        sources = tuple((pending.session.id, pending.push.fingerprint) for pending in pushes)
        answers = []
        for pending, contribution in zip(pushes, contributions, strict=True):
            result = PushResult(version=self.version, contribution=contribution, summary=summary)
            pending.session.apply(pending.push.sequence, result, now)
            answers.append(Answer(pending.push.key, result))
        return Update(summary, weight, absent, self.update_counts, sources), answers

    def count_update(self, version: int, absent: frozenset[int]) -> None:
        """Advances the version and the counts of the tensors that an update changes."""
        self.version = version
        self.update_counts = tuple(n + (index not in absent) for index, n in enumerate(self.update_counts))

    def bump_version(self) -> BumpVersion:
        """Gives the weights the next version, unchanged, because sessions were told to compute on it."""
        self.version += 1
        return BumpVersion(self.version)

    def give_up(self, pending: PendingPush, refusal: Refused, now: float) -> Refuse:
        """Takes back that a push was accepted; its sequence number is free again."""
        pending.session.give_up(pending.push.sequence, now)
        return Refuse(pending.push.key, refusal)

    def open_round(self, opened: int) -> None:
        """Opens an empty round of all live sessions; `opened` is the oldest base version that it takes."""
        self.round = Round(opened=opened)
        for session in self.sessions.live():
            session.member = True
