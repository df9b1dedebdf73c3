"""From an observed kernel call to the records that a sink stores."""
