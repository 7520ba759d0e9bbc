"""Rollouts from SGLang servers: server processes, HTTP client, weight sync, and the plug-in that servers load.

    engine           the engine that training calls. The leader of each replica talks to servers; other ranks wait
    fleet            the servers of a replica: checks running ones, or starts its own
    launch           command line and environment of a server
    processes        supervision of server processes: start, liveness, restart, end; guard ends them with their parent
    memory           release and resume of the GPU memory of colocated servers
    pool             routing of requests to servers, retries, and servers that drop out and return
    protocol         the JSON of a request and of its response; payload: images, videos and positions in a request
    weight_sync      which servers get new weights, when, and from which replica
    weight_update    one transfer of all weights to some servers
    channels         the ways of sending weights: broadcast, GPU memory, shared memory, disk
    http             HTTP calls, and the errors that they raise
    serving          servers without training: `vcr1 rollout serve`
    plugin           runs in the servers, with payload and patches: gives them the trainer's frames and positions

Every server reports a version of its weights, and gets requests only while that is the policy's version. Three kinds of
markers replace the version in between. They make sure that a server in an unknown state is never taken for a good one,
no matter which process dies at which moment:

    weight_update.LOADING                  while weights are loaded: some are new, others are old
    memory.RELEASED and the version        while the server's memory is released
    memory.WEIGHTS_ONLY and the version    while only its weights have memory, around a weight sync; LOADING may follow

The server stores the marker. So it outlives a trainer that is killed, and disappears with a server that is killed.
"""
