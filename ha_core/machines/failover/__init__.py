"""Leases and failover: records in the database, the procedures that change them, and the machines that act on them.

``records`` what is kept; ``commands`` and ``procedures`` the log entries that change it (rules L1-L7 of docs/guarantees.md);
``inventory`` the decoded view of one replica; ``leases`` the leader's answers to guards; ``planner`` and ``coordinator`` what
runs where; ``host_agent`` from committed assignments to driver calls; ``isolation`` what a host that lost the quorum sees.
"""
