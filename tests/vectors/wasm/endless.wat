;; Never returns by itself: only fuel, a deadline or a kill ends it.
(module (func (export "run") (loop $again (br $again))))
