"""The seam (`base`) and what stands behind it: `solo`, `threads`, `allreduce`; the parameter server is in `dtrain.ps`."""
