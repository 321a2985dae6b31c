"""Where units of work run, and how they survive.

Parts on disk are the journal: a unit is done when its part file is there and its digests agree, and not before. This
room knows nothing of models; the work is handed to it as a callable. Import the submodules; this file stays empty
because every worker process imports it.
"""
