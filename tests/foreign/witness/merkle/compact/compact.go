// Package compact passes on the released one.
package compact

import original "original.invalid/merkle/compact"

// NodeID is the released one.
type NodeID = original.NodeID

// What the released proof package uses of it.
var (
	RangeSize  = original.RangeSize
	NewNodeID  = original.NewNodeID
	RangeNodes = original.RangeNodes
)
