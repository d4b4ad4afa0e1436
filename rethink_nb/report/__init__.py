"Intervals and verdicts, tables, figures and pages, all from plain frames."
from .figures import fig_accuracy_cost, fig_arms, fig_curves, fig_widths
from .networks import coupling_table, fig_coupling, fig_kept_channels, fig_layer_costs, fig_site_widths, fig_width_latency
from .page import write_page
from .stats import Comparison, Exactness, compare, exactness, power, seeds_needed, statement, summary, verdicts
from .tables import beyond_table, format_table, html_table, missing, shown, trial_table
