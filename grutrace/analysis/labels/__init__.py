"""Gates and states against labels: selectivity, coding, probes, segmentation."""
