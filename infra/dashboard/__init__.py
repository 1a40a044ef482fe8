"""`polyrl dashboard`: a read-only page over stored runs, live while they go.

browser --> Guard (host, token, headers) --> app (routes) --> Feed (events, as columns)  --> events.jsonl
                                                         --> Rollouts (DuckDB, paged)    --> rollouts/*.parquet, ledger.sqlite
"""
