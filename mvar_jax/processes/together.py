"""One program in all processes of a run: an error of one ends all with the same exit status."""

import time
import traceback
from collections.abc import Callable

from mvar_jax.errors import InputError, RunError, describe_file_error, is_file_error, is_input_error, shorten
from mvar_jax.processes import group, platforms
from mvar_jax.processes.join import OFF, join, part
from mvar_jax.stopping import STOPPED_STATUS, Stopped

# An error waits for the news that another process failed first: a lost process breaks the others' collectives.
CONSEQUENCE_S = 1.0


def run_together(program: Callable[[], int], distributed: str = OFF) -> int:
    """Join the other processes, run a program and return its exit status.

    InputError, a file that is missing or not permitted, and devices that jax cannot start are reported in one line
    with status 2, RunError and other errors of a file or its disk with status 1, an interruption with 130 and another
    signal with STOPPED_STATUS. In a run of several processes these and any other exception end all processes, see
    `group.Group.fail`.

    Args:
      program: returns an exit status; 0 if all went well.
      distributed: the option of this name.
    """
    try:
        join(distributed)
        status = program()
        part()
        return status
    except InputError as error:  # such as "checkpoint cannot be read", because its arrays need a device
        return _end(2, str(platforms.explain(error) or error))
    except RunError as error:
        _let_the_cause_come()
        return _end(1, str(error))
    except KeyboardInterrupt:
        return _end(130, "interrupted")
    except Stopped as stopped:
        return _end(STOPPED_STATUS, str(stopped))
    except Exception as error:
        _let_the_cause_come()
        if isinstance(error, OSError) and is_file_error(error):
            return _end(2 if is_input_error(error) else 1, describe_file_error(error))
        if unstarted := platforms.explain(error):
            return _end(2, str(unstarted))
        if group.current().count == 1:
            raise
        traceback.print_exc()
        return _end(1, f"{type(error).__name__}: {shorten(error)}")


def _let_the_cause_come() -> None:
    if group.current().count > 1:
        time.sleep(CONSEQUENCE_S)  # if another process failed first, this one is told to leave meanwhile


def _end(status: int, reason: str) -> int:
    here = group.current()
    if here.count > 1:
        here.fail(status, reason)
    group.say_why(status, reason)
    return status
