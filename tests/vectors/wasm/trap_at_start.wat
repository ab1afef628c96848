;; Traps while it is instantiated: its data lies outside its memory.
(module (memory 1) (data (i32.const 65530) "0123456789") (func (export "run")))
