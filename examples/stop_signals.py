"""Signals that ask to end, for the Python twins of `gateloop train`: they finish a step first."""

import signal

# From a terminal: HUP, INT, QUIT. From kill, containers and init systems: TERM. From batch
# schedulers before their time limit: USR1, USR2, XCPU.
STOP = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
received = [0]  # the first signal


def record_signals() -> None:
    """Of STOP, in place of ending the process. A signal that is ignored (nohup) stays so."""

    def record(number: int, _: object) -> None:
        received[0] = received[0] or number

    for number in STOP:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, record)
