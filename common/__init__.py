"""What both sides agree on: the broker, every worker, every spawner and every client import from here.

Read in this order; a module imports only from those above it.
    errors       what can go wrong, sorted by what the catcher does next.
    names        what may be a name: of a thread, of a process, of a socket.
    paths        where runtime, state and configuration live.
    kernel       the few Linux calls that Python lacks: the only ctypes and ioctl of the project.
    outcome      how a process ended; never a made-up number.
    descriptors  the descriptors of one process, owned, closed exactly once.
    rules        what may come true of a process, and wake its thread; when its output matches.
    transcript   a memfd with a header: everything a process printed, by offset, for ever.
    inlet        a memfd with what is still to be typed, and what was asked: input counts once.
    pump         terminal → transcript and inlet → terminal, without holding a byte.
    ending       who can know how a process ended, asked in order.
    channel      descriptors between processes: SOCK_SEQPACKET, with peers checked by the kernel.
    notify       what keeper, broker and spawner tell each other.
    launch       starting a process of our own; the names that children carry.
    config       the configuration file.
    program      a thread's program, and what it is woken with.
    messages     every request, notice and reply, as frozen types.
    wire         messages as bytes, with limits; the ZeroMQ sockets.
    response     the result of one tool call, as an object and as text.
    scanner      what is looked for in a process's output, before anything of it is punched out.
    typist       whose input is typed next, and what is taken back.
    held         one process in the hands of whoever pumps it, worker or broker.
    tree         every process that a child started, found and signalled.
    unit         the broker's systemd unit, if it is installed: where it is, how it is started.
    connection   one connection to the broker: found or started, greeted, asked, lost.
    client       the Python API.

What the spawner uses, `errors` to `launch` but for `paths` and `rules`, loads neither ZeroMQ nor asyncio, and
nothing that makes or checks classes: it forks, and a fork costs what it weighs.  Its records are named tuples.
"""
