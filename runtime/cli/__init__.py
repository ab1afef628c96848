"""The command line: one file per verb.

Results go to stdout and messages to stderr. What goes wrong is told in one line, with one more
on what to do; the exit codes are those of ``errors.Exit``.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from safeconduct.errors import Error, Exit


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code.

    An error of ours is told in two lines on stderr; anything unforeseen is our bug: exit 1.
    """
    from .app import dispatch
    from .terminal import prepare_streams, tell, tell_error

    prepare_streams()
    try:
        code = dispatch(arguments)
        sys.stdout.flush()
    except Error as error:
        tell_error(error)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return Exit.SIGNAL + 2
    except BrokenPipeError:
        # Whoever read our output left, as `| head` does: end like a program killed by SIGPIPE,
        # and keep the interpreter from flushing into the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return Exit.SIGNAL + 13
    except OSError as error:
        tell(f"{error.filename or 'the system'}: {error.strerror}", "check the path and its mode")
        return Exit.FAILURE
    except Exception:  # whatever it is, it must not end with a code that means something else
        traceback.print_exc()
        tell("this is a bug of ours; please report it")
        return Exit.BUG
    return code
