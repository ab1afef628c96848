;; Starts with 1 GiB.
(module (memory 16384) (func (export "run")))
