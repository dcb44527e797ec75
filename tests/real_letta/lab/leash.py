"""Runs one program that must not outlive its parent; every process of the lab is started through this file.

`python -I leash.py PARENT_PID SIGNAL UID:GID|- PROGRAM ARG...`: gives up root if told to, asks the kernel to send
SIGNAL when the parent dies, however it dies, and becomes PROGRAM.
"""

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    """Become the program named on the command line."""
    parent, death_signal, owner, *program = sys.argv[1:]
    if owner != "-":
        uid, gid = (int(part) for part in owner.split(":"))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # After setuid: a change of credentials clears the request.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != int(parent):  # the parent died before the request was made
        sys.exit(1)
    os.execvp(program[0], program)


if __name__ == "__main__":
    main()
