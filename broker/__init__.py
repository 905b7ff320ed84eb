"""The broker: it holds what must not die with a worker.

Read in this order; a module imports only from those above it, and from `common`.
    custody      who holds a process, and every move between holders.  Decides; does nothing.
    lifecycle    when a thread's worker is started, replaced, sent to bed, given up.  Decides; does nothing.
    archive      what is kept of ended processes, and the ids a thread has used: files, no network.
    detached     the `DetachedStore`: processes that the broker itself pumps.
    peers        who is connected: workers and clients, by channel, token and route.
    entries      what is known of one process and of one thread: records, and how they are shown.
    processes    deposits and words of workers in, what custody decides done.
    workers      what lifecycle decides done; who waits for a worker.
    threads      the `ThreadManager`: detach, reattach, clean, shut down.
    operations   what each client request does.
    loop         the only place with sockets, signals and the clock.
    __main__     options, logging, the lock that keeps a second broker out.

Places kept for what is to come: `wakes` (which endings wake which thread) and `journal` (what must survive a
reboot) beside custody; `keeper`, the small parent of this process, beside `__main__`.
"""
