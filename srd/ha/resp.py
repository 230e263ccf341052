"""RESP, the wire: one connection that asks within a bound, its errors in our words, and replies read strictly.

The only importer of redis-py, whose errors end here: callers see `RespError` and its four meanings. A connection is
opened at the first question, kept, and closed by any failure; the next question opens it anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Final, TypeVar

import redis.exceptions as resp
from redis.asyncio import Connection
from redis.credentials import CredentialProvider

from srd.model import Endpoint, NoAnswerError, Secret, SrdError

T = TypeVar("T")

# A reply from a healthy peer takes well under a millisecond; on a slow machine 100 ms and more have been seen.
ANSWER_SECONDS: Final = 1.0
# After this much silence of a peer that should acknowledge, the kernel gives a connection up.
SILENCE_SECONDS: Final = 3

_SOCKET_OPTIONS: Final = {
    socket.TCP_KEEPIDLE: 1,
    socket.TCP_KEEPINTVL: 1,
    socket.TCP_KEEPCNT: SILENCE_SECONDS,
    socket.TCP_USER_TIMEOUT: SILENCE_SECONDS * 1000,
}


class RespError(SrdError):
    """A redis or a sentinel could not be asked, or its answer is of no use."""


class UnreachableError(RespError, NoAnswerError):
    """Nobody answers there, or not in time."""


class NobodyThereError(UnreachableError):
    """The connection was refused: whatever was asked for was not even heard."""


class RefusedError(RespError):
    """It answers, but does not take our password or does not allow the command."""


class LoadingError(RespError):
    """It is up, and reads its data set into memory."""


class UnexpectedReplyError(RespError):
    """It answers something that cannot be understood."""


@contextlib.contextmanager
def _translated(subject: str) -> Iterator[None]:
    """Turn redis-py's and the system's errors into ours.

    `from None`: frames of the foreign traceback hold the password, and a traceback may be shown with its variables.
    """
    operation = "ask"
    try:
        yield
    except resp.BusyLoadingError:
        raise LoadingError(operation, subject, "it is loading its data set") from None
    except (resp.AuthenticationError, resp.AuthorizationError, resp.NoPermissionError) as error:
        remedy = "the passwords of this node's bundle and those of the running program differ"
        raise RefusedError(operation, subject, str(error), remedy) from None
    except (TimeoutError, resp.TimeoutError):
        raise UnreachableError(operation, subject, "no answer in time") from None
    except (OSError, resp.ConnectionError) as error:
        number = _system_error(error)
        kind = NobodyThereError if number == errno.ECONNREFUSED else UnreachableError
        raise kind(operation, subject, os.strerror(number).lower() if number is not None else str(error)) from None
    except resp.RedisError as error:
        raise UnexpectedReplyError(operation, subject, str(error)) from None


def _system_error(error: BaseException) -> int | None:
    """Return the system's own error where there is one below redis-py's."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.errno is not None:
            return below.errno
        below = below.__cause__ or below.__context__
    return None


class Credentials(CredentialProvider):
    """Reveals the password when a connection is made and at no other time."""

    def __init__(self, user: str, password: Secret) -> None:
        self._user = user
        self._password = password

    def get_credentials(self) -> tuple[str, str]:
        """Return user and password, for the AUTH of a connection that is being made."""
        return self._user, self._password.reveal()

    async def get_credentials_async(self) -> tuple[str, str]:
        """Return the same; redis-py asks in this way."""
        return self.get_credentials()


class Wire:
    """One connection for questions and answers. Questions of several callers queue up, within their own bounds."""

    def __init__(self, what: str, endpoint: Endpoint, credentials: Credentials) -> None:
        self.subject = f"{what} at {endpoint}"
        self._lock = asyncio.Lock()
        # Bounds are set around whole questions; `driver_info=None` spares two commands at each connect. No retries: the
        # caller has its own policy.
        self._connection = Connection(
            host=str(endpoint.address),
            port=endpoint.port,
            protocol=2,
            credential_provider=credentials,
            decode_responses=True,
            encoding_errors="backslashreplace",
            socket_timeout=None,
            socket_connect_timeout=ANSWER_SECONDS,
            socket_keepalive=True,
            socket_keepalive_options=_SOCKET_OPTIONS,
            driver_info=None,
        )

    async def ask(self, *commands: tuple[str, ...], seconds: float) -> list[Any]:
        """Send the commands in one go and return their replies; an error reply is a value among them."""
        with _translated(self.subject):
            async with asyncio.timeout(seconds), self._lock:
                kept = self._connection.is_connected
                try:
                    return await self._exchange(commands)
                except (resp.AuthenticationError, resp.BusyLoadingError):
                    raise
                except resp.ConnectionError:
                    # The other side may have closed a kept connection long ago, by a restart say; that is only seen at
                    # its next use. Questions change nothing, and a setting that is made twice is as if made once.
                    if not kept:
                        raise
                    return await self._exchange(commands)

    async def tell(self, command: tuple[str, ...], *, seconds: float) -> Any:
        """Send a command that must not be done twice, and return its reply, as `ask` does.

        Over a new connection: one that was closed long ago is no reason to try again then, and nothing else is.
        """
        with _translated(self.subject):
            async with asyncio.timeout(seconds), self._lock:
                await self._connection.disconnect()
                (reply,) = await self._exchange((command,))
                return reply

    async def _exchange(self, commands: tuple[tuple[str, ...], ...]) -> list[Any]:
        try:
            await self._connection.send_packed_command(self._connection.pack_commands(commands))
            return [await self._reply() for _ in commands]
        except BaseException:
            # Replies that were not read would be taken for those of the next question.
            await self._connection.disconnect(nowait=True)
            raise

    async def _reply(self) -> Any:
        try:
            return await self._connection.read_response()
        except resp.ResponseError as error:
            return error

    async def subscribe(self, pattern: str) -> AsyncGenerator[tuple[str, str], None]:
        """Yield `("", "")` once subscribed and then (channel, message) until the connection fails."""
        try:
            with _translated(self.subject):
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._connection.send_command("PSUBSCRIBE", pattern)
                    await self._connection.read_response()
            yield "", ""
            while True:
                with _translated(self.subject):
                    reply = await self._connection.read_response()
                yield str(reply[-2]), str(reply[-1])
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connection; the next question opens it anew."""
        with contextlib.suppress(OSError, resp.RedisError):
            await self._connection.disconnect()


class Fields:
    """Named values of a reply. A value that is missing or is not what it should be is an error, never a default."""

    def __init__(self, subject: str, values: dict[str, str]) -> None:
        self._subject = subject
        self._values = values

    @classmethod
    def of_info(cls, subject: str, replies: list[Any]) -> Fields:
        """Read replies to INFO: lines of `name:value`."""
        lines = "\n".join(checked(subject, reply, str) for reply in replies).splitlines()
        pairs = (line.partition(":") for line in lines if line and not line.startswith("#"))
        return cls(subject, {name: value for name, _, value in pairs})

    @classmethod
    def of_list(cls, subject: str, reply: Any) -> Fields:
        """Read a flat list of names and values; names in lower case, for SENTINEL DEBUG shouts them."""
        items = [str(item) for item in checked(subject, reply, list)]
        if len(items) % 2:
            raise UnexpectedReplyError("understand", subject, "a name without a value")
        return cls(subject, dict(zip(map(str.lower, items[::2]), items[1::2], strict=True)))

    @classmethod
    def of_line(cls, subject: str, line: str) -> Fields:
        """Read one line of `name=value,name=value`."""
        pairs = (part.partition("=") for part in line.split(","))
        return cls(subject, {name: value for name, _, value in pairs})

    def get(self, name: str, convert: Callable[[str], T]) -> T:
        """Return a value; a failure names the field."""
        if name not in self._values:
            raise UnexpectedReplyError("understand", self._subject, f"{name} is missing")
        value = self._values[name]
        try:
            return convert(value)
        except (KeyError, ValueError) as error:
            raise UnexpectedReplyError("understand", self._subject, f"{name} is {value!r}") from error

    def endpoint(self, host: str, port: str) -> Endpoint:
        """Return the endpoint whose address and port have these names."""
        return Endpoint(self.get(host, ipaddress.ip_address), self.get(port, int))

    def lines(self, prefix: str) -> list[Fields]:
        """Return the numbered lines `prefix0`, `prefix1`, and so on, each a list of `name=value`."""
        found = (
            value for name, value in self._values.items() if name.startswith(prefix) and name[len(prefix) :].isdigit()
        )
        return [Fields.of_line(self._subject, value) for value in found]

    def __contains__(self, name: str) -> bool:
        return name in self._values


def checked(subject: str, reply: Any, kind: type[T]) -> T:
    """Return a reply of the kind that was expected; an error reply is raised as ours."""
    if isinstance(reply, resp.RedisError):
        with _translated(subject):
            raise reply
    if not isinstance(reply, kind):
        raise UnexpectedReplyError("understand", subject, f"the reply is a {type(reply).__name__}")
    return reply


def alive(subject: str, reply: Any) -> None:
    """Check the reply to PING. -MASTERDOWN (replica-serve-stale-data no) is a sign of life, too."""
    if not isinstance(reply, resp.MasterDownError):
        checked(subject, reply, str)


def flag(text: str) -> bool:
    """Return what INFO means by 0 and 1; another text is none of it."""
    return {"0": False, "1": True}[text]
