"""What `scripts/chaos` is made of: children whose truth is known, deaths at chosen moments, and the accounts.

Read in this order; a module imports only from those above it.
    tally        what is counted, what of it must be zero, and how it is shown.
    scene        what the parts of one run share: the host, the choices, the named moments, repeating a call.
    children     what is run meanwhile (floods, short commands, a shell, sleepers), and how each is verified.
    woken        the program of a thread that is woken; its effects count.
    watched      processes that are waited for, and whether each wake came once.
    victims      our own processes, found and killed.
    mischief     who is killed when: a table, and the imp that carries it out.
    upgrades     one upgrade after the other.
    accounts     what must be as it was before: descriptors, processes, the log.
    run          one run of all that.
    beyond       runs that must see a loss, since a check that cannot fail proves nothing.
"""
