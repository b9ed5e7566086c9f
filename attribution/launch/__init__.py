"""How the runs of a study get done: in slots of this machine (`slots`), or as one array job of a Slurm cluster (`slurm`).

Either takes jobs and says of each, as it ends, what went wrong with it, if anything; one that fails leaves the others alone.
Knows runs and their directories; knows nothing about studies, arms or claims.
"""

from attribution.launch.job import Job, attempt, log_of, mark_lost
from attribution.launch.slots import end_with_parent, outcomes_in_slots
from attribution.launch.tickets import Ticket, tickets

__all__ = ["Job", "Ticket", "attempt", "end_with_parent", "log_of", "mark_lost", "outcomes_in_slots", "tickets"]
