"""Whether a session was refused a moment ago, and how processes hear of it from each other.

`shortage` is the rule, and `refusal` says what counts. `watch` is what the pools of one event loop
use. Processes exchange ends of shortages through one `store`: `machine` or `redis`. None of this is
on the path of a turn.
"""

from ..errors import InvalidOptionError
from .machine import MachineStore
from .redis import RedisStore
from .store import Store as Store


def store_from(redis_url: str | None, named: str = "redis_url") -> Store:
    """The store of this process. Connects to nothing.

    Args:
        redis_url: a Redis for several machines; None for a file, which only this machine sees.
        named: the option or variable that has the URL, for the error.

    Raises:
        InvalidOptionError: the URL is wrong, or the package `redis` is missing.
    """
    if redis_url is None:
        return MachineStore()
    try:
        return RedisStore(redis_url)
    except ImportError:
        problem = "needs the package redis: pip install 'xai_pool_patch[redis]'"
    except Exception as error:
        # Neither its message nor its cause: both may quote the URL, and with it a password.
        kind = type(error).__name__
        problem = (
            f"is no URL of a Redis ({kind}): it must be like redis://user:password@host:6379/0"
        )
    raise InvalidOptionError(f"{named} {problem}")
