"""The bounded policy (stale synchronous parallel): every push is an update at once, but nobody runs far ahead."""

from collections.abc import Iterable
from dataclasses import dataclass

from deltaserve_server.model.decision import Answer, Decision, Fold
from deltaserve_server.model.policies.base import UpdatePolicy
from deltaserve_server.model.push import Push
from deltaserve_server.model.refused import Refused
from deltaserve_server.model.round import PendingPush
from deltaserve_server.model.sessions import Session
from deltaserve_server.model.versioned_model import VersionedModel

_RETRY_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounded(UpdatePolicy):
    """Every push is an update at once; a worker that is too far ahead waits for its answer (Ho et al., 2013).

    The push of a fast worker counts at once. Its answer, and with it the new weights, comes when the slowest live
    session has caught up: a client that honours the contract computes nothing in the meantime.

    Attributes:
        slack: How many steps a session may be ahead of the slowest live session.
    """

    slack: int = 0

    def check(self, model: VersionedModel, session: Session, push: Push, base_version: int) -> None:
        """Refuses a push of a session whose last answer is withheld."""
        if (session.id, session.last_accepted) in model.withheld:
            ahead = session.clock - model.sessions.slowest_clock()
            raise Refused("SLACK_EXCEEDED", _RETRY_SECONDS, ahead=ahead, slack=self.slack)

    def accept(self, model: VersionedModel, pending: PendingPush, now: float) -> list[Decision]:
        """Makes an update of the push, and withholds its answer while the session is too far ahead."""
        pending.session.clock += 1
        update, answers = model.update([pending], model.hyperparameters(pending.push.hyperparameters), now)
        decisions: list[Decision] = [Fold(pending.push.key, pending.push.weight), update]
        if self._waits(model, pending.session.id):
            model.withheld[pending.push.key] = answers[0]
            return decisions
        return [*decisions, *answers]

    def advance(self, model: VersionedModel, now: float) -> list[Decision]:
        """Gives the withheld answers of sessions that are not too far ahead any more."""
        due = [key for key in model.withheld if not self._waits(model, key[0])]
        return [model.withheld.pop(key) for key in due]

    def replay_update(self, model: VersionedModel, sessions: Iterable[Session]) -> None:
        """Counts the step."""
        for session in sessions:
            session.clock += 1

    def resume(self, model: VersionedModel) -> None:
        """Withholds again the answers of sessions that are too far ahead.

        Their workers send the last push again, because they never got its answer.
        """
        for session in model.sessions.live():
            record = session.window.get(session.last_applied)
            if record and record.result and self._waits(model, session.id):
                key = session.id, session.last_applied
                model.withheld[key] = Answer(key, record.result)

    def _waits(self, model: VersionedModel, session_id: bytes) -> bool:
        """Returns whether a session is too far ahead. One that has ended holds nobody up, so it does not wait."""
        session = model.sessions.find(session_id)
        return session is not None and session.clock - model.sessions.slowest_clock() > self.slack
