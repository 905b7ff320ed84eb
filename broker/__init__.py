"""The broker: it holds what must not die with a worker.

Read in this order; a module imports only from those above it, and from `common`.
    keeper       the parent of this process: it keeps what must not die with the broker.  Understands nothing.
    custody      who holds a process, and every move between holders.  Decides; does nothing.
    lifecycle    when a thread's worker is started, replaced, sent to bed, given up.  Decides; does nothing.
    records      what is kept of ended processes, and which of it has to go.  Decides; does nothing.
    wakes        what becomes of a wake, and when a thread's program is run.  Decides; does nothing.
    ledger       which rows are to be written, and who waits for it.
    outbox       programs and wakes, as they are written.
    database     the journal's file, whatever is wrong with it.
    rulebook     the rules that were added to processes after their start; a part of the journal.
    journal      what must survive a reboot: threads, the ids they used, what became of them.
    findings     what a broker that starts makes of what it finds.  Decides; only looks.
    epochs       which workers and spawners live, also those of a former broker.
    keeping      the keeper, as the broker sees it.
    events       what subscribers are told, and the recent ones for who comes later.
    detached     the `DetachedStore`: processes that the broker itself pumps.
    watches      what is watched of each process, and which wake rules have come true.  Decides.
    alarm        its clock, and who listens on which port.
    peers        who is connected: workers and clients, by channel, token and route.
    entries      what is known of one process and of one thread: records, and how they are shown.
    world        what the modules from here on need of the loop.
    holding      `Holding`: all threads and their processes; does what custody decides.
    processes    `Processes`, on top of that: what becomes of deposits, notices and what a former broker left.
    workers      `Workers`, on top of both: does what lifecycle decides; who waits for a worker waits here.
    threads      `ThreadManager`, on top of all: detach, reattach, clean, shut down.
    inventory    what a resumed agent finds of its processes.
    delivery     what came true is written down, and then the thread's program is run.
    succession   one broker takes over from another that lives.
    watching     `watch` and `wait`: rules that are set on processes which have started.
    operations   what each other client request does.
    loop         the sockets, the signals, the workers' pidfds.
    __main__     limits, signals that are ignored, the lock that keeps a second broker out; serving again when a
                 successor does not come up.

`Holding`, `Processes`, `Workers` and `ThreadManager` are one object in four layers: the loop and the operations
have one `ThreadManager`, and what it needs of the loop is the protocol `world.World`.

One `exec_command`: `loop` checks the frame and its token; `operations` waits for a worker (`workers` starts it) and
sends the request on; the worker's spawner deposits the descriptors on the worker's channel (`loop`, `processes`);
the worker's reply comes back through `peers`.

One death of a worker: `loop` learns of it by pidfd or SIGCHLD and reads the rest of its channel; `workers` gives
its processes to the broker by way of `custody` (`holding` starts pumps in `detached`), and starts the next worker
by way of `lifecycle`; when that has registered, `threads` sends everything to it.  Calls that were under way fail
with `WorkerGone` in `operations`, which asks the next worker.

One death of the broker: `keeper` starts the next with all it holds; `__main__` takes the lock; `loop` asks `epochs`
who survived, has `findings` tell what each descriptor is, and `processes` judges each process by its table; workers
come back, register and say what they hold and what they are starting (`workers`).

One wake: `watches` finds that a rule came true; `delivery` writes it to the `outbox`, has `workers` resume the
thread, sends its worker the run, writes down the answer, and sends the thread to bed.
"""
