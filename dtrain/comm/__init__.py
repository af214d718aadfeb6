"""The seam (`base`) and what stands behind it: solo, threads, allreduce. The parameter server is in `dtrain.ps`."""
