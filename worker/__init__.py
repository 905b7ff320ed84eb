"""The worker: the process that runs one thread session, and may die at any moment.

Read in this order; a module imports only from those above it, and from `common`.
    commands     what a call becomes: the argv and environment of a child.  Decides; starts nothing.
    pruning      which process makes room for a new one.  Decides; does nothing.
    ids          the ids of a thread's processes: which one is next.  Decides.
    watchers     output as deltas, an end as one event.  Decides what to say; `link` says it.
    spawner      a small program beside the worker: it forks, deposits, and records how children ended.
    nursery      the worker's end of it: one start, from an order to the handles of a process.
    processes    the `ProcessManager`: exec_command, write_stdin, export, import.
    agent        the `Session` of a program: the API of its own thread.
    programs     the thread's program, loaded or run.
    link         the connection to the broker: handshake, registration, reconnecting for ever.
    session      requests in, replies and notices out.
    __main__     arguments, limits, signals that are ignored.

One `exec_command`: `link` receives it, `session` takes it apart, `processes` gives `nursery` an order, `spawner`
deposits, forks and deposits the rest; `processes` holds what comes back (`common.held`) and answers; `session`
sends the answer through `link`.

The agent's own code runs in this process too, in the same loop (`programs` says what that means): nothing here may
block it.
"""
