"""fedcodec inside the engines that people run; each module needs its engine."""
