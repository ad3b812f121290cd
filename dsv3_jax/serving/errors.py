"""Errors in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An error that a client is told.

    Attributes:
      status: of the HTTP response.
      param: the field of the body that is wrong.
      code: a short name for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """Returns the JSON object of the error."""
        kinds = {401: "authentication_error", 404: "not_found_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
