"""The guard: starts and watches the agents, renews the host's lease by itself, and keeps every VM under a shim with a deadline.

Standard library only, one thread, no trio, no plug-ins: it must start in milliseconds and work when everything else is broken.

One name per module, both ways of running. The modules import each other as ``ha_core.guard.<module>``. Inside the library
that is what they are. Run as a folder (``python -I -S .../ha_core/guard --config FILE``), ``__main__`` first puts an empty
module called ``ha_core`` into ``sys.modules`` whose path is the folder above: so ``ha_core/__init__.py``, and with it attrs
and trio, is never executed, and the names are the same. The tidy test holds that nothing here imports anything of ours
outside ``ha_core.guard``.

renewal       datagrams between guard and active primary     control       guard.sock and the beats
rules         leases and VMs, decided without I/O            watch         hang verdicts and restarts of processes, without I/O
events        what the rules are told and ask for          server        guard.sock's clients
mapping       the file of one run: deadline, identity        kernel_timer  the timer that kills, prctl, unshare
shim          the parent of one VM                           processes     pidfds, identities, launching
primaries     where the renewals go                          key           the cluster key, read anew when it changes
links         the sockets that they leave by                 loop          the selectors loop that joins all of it
"""
