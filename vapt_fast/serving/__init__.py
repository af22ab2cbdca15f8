"""A server for many adapters on one backbone.

``service`` is what a replica does, ``http`` what clients see of it, ``store`` the adapters that all replicas
share, and ``engine`` what runs replicas and fills batches: Ray Serve, which comes with the extra ``serve``,
and is imported by the functions that need it. docs/serving.md describes the server.
"""

from .options import ServeOptions, token_digest
from .refusal import Refusal

__all__ = ["Refusal", "ServeOptions", "token_digest"]
