"""Our own sans-IO Raft: pre-vote, check-quorum, ReadIndex, learners, transfer, snapshots in chunks.

``raft.Raft`` is the machine; ``types`` has its events and effects. Sources: Ongaro's dissertation (sections are cited where
they apply) and etcd-io/raft. Configurations take effect when they are appended, as in the dissertation.
"""
