"""Rollouts from SGLang servers: processes, client, weight sync, and the plug-in that the servers load.

    engine       what training calls; one rank of each copy of the model does it, the others wait
    fleet        which servers a copy asks and looks after; processes (guard) starts them, loan lends their memory
    pool         which server answers a request, and what follows from faults; protocol and payload: what is said
    delivery     when servers get weights, and from whom; weight_sync: one transfer, channels: its three ways
    http         a call, and whose fault it is if it fails
    serving      servers without a training: `vcr1 rollout serve`
    plugin       runs in the servers, with payload and patches: pictures and positions as training has them

A server is asked only while it reports the policy's version of the weights. While they change it reports
`weight_sync.LOADING`, and while its memory is lent `loan.LENT` and the version.
"""
