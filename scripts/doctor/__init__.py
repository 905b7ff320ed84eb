"""`outlive doctor`: whether this machine and this user's folders are fit for outlive, and what to do where not.

Read in this order; a module imports only from those above it, and from `common`.
    finding      what one check found, and how bad that is.
    processes    the user's processes as /proc shows them; those with our mark that nobody holds.
    features     what the kernel can.
    limits       how many processes fit: descriptors, pipes, memory files, tasks.
    folders      who may look into our folders, and whether they can be written to.
    runtime      sockets, locks and notes of the runtime folder; the broker, keeper and workers behind them.
    session      whether a logout takes the broker along.
    examination  all of it, in the order in which a person reads it.

Each check is a pure function, facts in, findings out, beside the thin probe that gathers its facts.

Always true
    Nothing is changed and no broker is started.  A lock is looked up in /proc/locks, never tried: a broker that
    starts in that moment would take us for another broker.
    Nobody is waited for without a limit, and a broker that is stopped is not waited for at all.
    What cannot be looked at is said to be unknown, and is never a reason to fail.
"""
