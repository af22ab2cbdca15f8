"""A request that is not carried out, with the reason."""

from __future__ import annotations

__all__ = ["Refusal"]


class Refusal(Exception):
    """What a client did wrong, or must wait for.

    Attributes:
        status: of HTTP.
        reason: one sentence for the client.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason

    def __reduce__(self) -> tuple[type[Refusal], tuple[int, str]]:
        return Refusal, (self.status, self.reason)
