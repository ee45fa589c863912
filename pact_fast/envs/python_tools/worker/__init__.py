"""The sandbox: runs each call of an untrusted tool in a fresh, limited process.

    trainer ─ socket ─ supervisor ─ socket ─ zygote ─ fork ─ reaper ─ fork ─ init ─ fork ─ tool
                       (one of both per worker)              (new PID and IPC namespaces, if the system allows it)

Supervisors are forked from the fork server, one per pool, which has started Python, imported the modules and tried out
once what the system allows: a worker takes a few milliseconds then. Each worker applies all protections itself.

The supervisor talks to the trainer, passes each request to the tool through a pipe, watches the time, and validates
whatever the tool writes back. The zygote, its child, has imported the common modules and forks the other processes in
advance; they wait for a request and serve one call. It never sees a request, a source or an observation, so nothing of
one call is in the memory that the next tool inherits.

When the call has been answered, the zygote ends its processes: it kills the reaper, whose death kills init, and with init
the kernel kills all that the tool left in its namespace. Without namespaces the tool is the zygote's own child, and the
zygote kills all its descendants. Supervisor and zygote guard each other: when one is killed, the other cleans up and
exits, and so do both when the trainer is gone.

`pact_fast.envs.python_tools.client` runs this folder as a script. It uses the standard library only, nothing of the
package around it, and imports its own files by relative names.

frames       messages: a length, then JSON
settings     settings of a worker, and the limits of a call
linux        system calls
namespaces   network, mounts, devices
seccomp      system calls that tools cannot make
leftovers    ending processes, removing folders
tool         the tool's process: gives up rights, runs the source
zygote       forks the processes of a call
bubblewrap   starts them with bwrap instead
supervisor   serves the trainer
fork_server  forks the supervisors
"""
